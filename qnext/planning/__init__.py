"""Answers without torch, from a `ModelConfig` and the machine alone.

`parameters.py` lists every parameter with its kind, which counting, initial values, loading, quantising and update
rules read: a new parameter is a line there. `counts.py` counts, `flops.py` says what tokens compute, `anatomy.py` puts
both side by side, `workspace.py` bounds a step, `machine.py` asks what memory and processor there are, `plan.py`
decides what fits, `forecast.py` how fast it is, `expert_alerts.py` when the load of experts is a reason to look. May
import config. A new question about size or cost goes here.
"""

from __future__ import annotations

from qnext.planning.counts import (
    ActiveCounts,
    ParameterCounts,
    StateBytes,
    count_active,
    count_parameters,
    distinct_experts,
    kv_bytes_per_token,
    state_bytes_per_sequence,
    weight_bytes,
)
from qnext.planning.flops import (
    ForwardFlops,
    forward_flops_per_token,
    prefill_flops,
    token_flops,
    training_compute_ratio,
    training_flops,
)
from qnext.planning.parameters import Kind, ParameterInfo, list_parameters
from qnext.planning.workspace import StepSizes, recorded_bytes, step_bytes

__all__ = [
    "ActiveCounts",
    "ForwardFlops",
    "Kind",
    "ParameterCounts",
    "ParameterInfo",
    "StateBytes",
    "StepSizes",
    "count_active",
    "count_parameters",
    "distinct_experts",
    "forward_flops_per_token",
    "kv_bytes_per_token",
    "list_parameters",
    "prefill_flops",
    "recorded_bytes",
    "state_bytes_per_sequence",
    "step_bytes",
    "token_flops",
    "training_compute_ratio",
    "training_flops",
    "weight_bytes",
]
