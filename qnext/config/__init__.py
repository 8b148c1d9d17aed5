"""What a model is: a frozen description with the field names of Hugging Face's `config.json`. No torch."""

from __future__ import annotations

from qnext.config.hf import from_hf, is_wrapped, load_config_json, read_config, says_tied, to_hf
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
    "read_config",
    "says_tied",
    "to_hf",
]
