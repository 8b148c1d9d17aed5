"""Answers without torch, from a `ModelConfig` and the machine alone.

`parameters.py` lists every parameter with its kind, which counting, initial values, loading, quantising, GGUF names and
update rules read: a new parameter is a line there. `counts.py` counts, `workspace.py` bounds what a step takes,
`machine.py` asks what memory and processor there are, `plan.py` decides what fits, `expert_memory.py` which experts,
`expert_speed.py` says what that costs, `expert_shape.py` how evenly experts are used. May import config. A new question
about size or cost goes here.
"""

from __future__ import annotations

from qnext.planning.counts import (
    ActiveCounts,
    ParameterCounts,
    StateBytes,
    count_active,
    count_parameters,
    forward_flops_per_token,
    kv_bytes_per_token,
    state_bytes_per_sequence,
    weight_bytes,
)
from qnext.planning.parameters import Kind, ParameterInfo, list_parameters
from qnext.planning.workspace import StepSizes, recorded_bytes, step_bytes

__all__ = [
    "ActiveCounts",
    "Kind",
    "ParameterCounts",
    "ParameterInfo",
    "StateBytes",
    "StepSizes",
    "count_active",
    "count_parameters",
    "forward_flops_per_token",
    "kv_bytes_per_token",
    "list_parameters",
    "recorded_bytes",
    "state_bytes_per_sequence",
    "step_bytes",
    "weight_bytes",
]
