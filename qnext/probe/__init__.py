"""Looks into a model while it runs, and changes what it sees: named taps, edits, and what follows from them.

Nouns: ModelProbe (a context around calls of a model), Where (which tokens), Edit (a change), Captures (what was kept),
Look (what one pass shows). May import config, ops and model. A new tap is a name in `names.py` and a call of the Sight
where it lies; a tap inside a fused op is a `see` in its module, so that the formula stands once.
"""

from __future__ import annotations

from qnext.probe.attending import Attended
from qnext.probe.captures import Captures
from qnext.probe.changes import avoid_expert, replace, scale, silence_expert, steer
from qnext.probe.edits import Edit, same_bits
from qnext.probe.glance import Glance, Glancer, LayerGlance
from qnext.probe.look import AttentionLook, Look, look
from qnext.probe.names import match, tap_names
from qnext.probe.passing import Passing
from qnext.probe.probe import ModelProbe
from qnext.probe.rows import EVERYWHERE, LAST, BatchRows, Where
from qnext.probe.sight import DeltaSeen, Observer, Sight
from qnext.probe.steps import updates

__all__ = [
    "EVERYWHERE",
    "LAST",
    "Attended",
    "AttentionLook",
    "BatchRows",
    "Captures",
    "DeltaSeen",
    "Edit",
    "Glance",
    "Glancer",
    "LayerGlance",
    "Look",
    "ModelProbe",
    "Observer",
    "Passing",
    "Sight",
    "Where",
    "avoid_expert",
    "look",
    "match",
    "replace",
    "same_bits",
    "scale",
    "silence_expert",
    "steer",
    "tap_names",
    "updates",
]
