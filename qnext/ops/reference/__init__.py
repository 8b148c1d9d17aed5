"""The formula of every op: what it means, in which width, and where it rounds. Differentiable and not tuned.

The other backends are tested against it, forward and gradient. docs/numerics.md describes it in words. May import: the
caches, records, packing and weights of ops; no backend. A new op starts here. Where tuning gains nothing, ops/torch
takes the op from here.
"""

from __future__ import annotations

from qnext.ops.reference.attention import attention_mixer
from qnext.ops.reference.delta import gated_delta_rule
from qnext.ops.reference.delta_mixer import apply_pending, gated_delta_mixer
from qnext.ops.reference.matrices import (
    add_experts,
    add_linear,
    combine_experts,
    cross_entropy_sum,
    experts_swiglu,
    linear,
    lora_experts_swiglu,
    normed_linears,
    normed_route,
    route,
)
from qnext.ops.reference.norm import rms_norm
from qnext.ops.reference.rope import rope_cos_sin
from qnext.ops.reference.rounding import round_to_groups, rounding_errors
from qnext.ops.reference.rows import add, are_finite, argmax, concat, embedding, put_rows, swiglu

__all__ = [
    "add",
    "add_experts",
    "add_linear",
    "apply_pending",
    "are_finite",
    "argmax",
    "attention_mixer",
    "combine_experts",
    "concat",
    "cross_entropy_sum",
    "embedding",
    "experts_swiglu",
    "gated_delta_mixer",
    "gated_delta_rule",
    "linear",
    "lora_experts_swiglu",
    "normed_linears",
    "normed_route",
    "put_rows",
    "rms_norm",
    "rope_cos_sin",
    "round_to_groups",
    "rounding_errors",
    "route",
    "swiglu",
]
