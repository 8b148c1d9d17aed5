"""The configuration of a model: `ModelConfig`, a frozen record with the field names of `config.json`.

`hf.py` reads and writes the file. `families.py` has the defaults of each family, `keys.py` the meaning of other keys,
`presets.py` named configurations. Imports nothing of qnext but errors, and no torch. A new family begins in
`families.py`.
"""

from __future__ import annotations

from qnext.config.hf import from_hf, is_wrapped, load_config_json, says_tied, to_hf
from qnext.config.model import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, YarnScaling, hybrid_pattern
from qnext.config.presets import PRESETS, preset

__all__ = [
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "PRESETS",
    "ModelConfig",
    "YarnScaling",
    "from_hf",
    "hybrid_pattern",
    "is_wrapped",
    "load_config_json",
    "preset",
    "says_tied",
    "to_hf",
]
