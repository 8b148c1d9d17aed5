"""Plans as bytes, for executors that run elsewhere. Only the records below come out, whatever bytes come in."""

from __future__ import annotations

import json
from typing import Any

from qnext.engine.policy.archive import Load
from qnext.engine.policy.prefix_node import Spill
from qnext.engine.policy.step import DraftPlan, PromptScores, Rows, SequencePlan, StepPlan

Order = StepPlan | DraftPlan | None  # None: there will be no more
_RECORDS = {kind.__name__: kind for kind in (StepPlan, SequencePlan, PromptScores, DraftPlan, Rows, Load, Spill)}


def to_bytes(order: Order) -> bytes:
    return json.dumps(_plain(order), separators=(",", ":")).encode()


def from_bytes(written: bytes) -> Order:
    order: Order = _made(json.loads(written))
    return order


def _plain(value: Any) -> Any:
    """A list for a tuple. The first item is the name of the record, or nothing."""
    if not isinstance(value, tuple):
        return value
    name = type(value).__name__
    return [name if name in _RECORDS else "", *map(_plain, value)]


def _made(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    name, *items = value
    made = map(_made, items)
    return _RECORDS[name](*made) if name else tuple(made)
