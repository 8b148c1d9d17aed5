"""Answers from a ModelConfig alone: shapes, parameters, bytes. No torch."""

from __future__ import annotations

from qnext.planning.counts import (
    ActiveCounts,
    ParameterCounts,
    StateBytes,
    count_active,
    count_parameters,
    forward_flops_per_token,
    kv_bytes_per_token,
    part_of,
    state_bytes_per_sequence,
    weight_bytes,
)
from qnext.planning.shapes import parameter_shapes
from qnext.planning.workspace import StepSizes, recorded_bytes, step_bytes

__all__ = [
    "ActiveCounts",
    "ParameterCounts",
    "StateBytes",
    "StepSizes",
    "count_active",
    "count_parameters",
    "forward_flops_per_token",
    "kv_bytes_per_token",
    "parameter_shapes",
    "part_of",
    "recorded_bytes",
    "state_bytes_per_sequence",
    "step_bytes",
    "weight_bytes",
]
