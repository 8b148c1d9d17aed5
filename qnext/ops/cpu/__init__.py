"""Native CPU kernels. The wrappers check shapes, types and memory layout, and then pass addresses to the kernels.

Nouns: PanelWeight, a quantised matrix in the order in which the kernels read it. The kernels are in src/. May import:
the files of ops beside it; no other backend. A new op: a predicate `serves_...` with the op's own arguments, which says
whether the kernels take a call (fp32 activations on the CPU, no gradients unless the op has a kernel for them in
train_*.py, and the op's own conditions), and the wrapper, both listed here.
"""

from __future__ import annotations

from qnext.ops.cpu.attention import attention_mixer, fits_attention_mixer, fits_pages, serves_attention_mixer
from qnext.ops.cpu.delta import (
    apply_pending,
    fits_drafts,
    fits_gated_delta_mixer,
    gated_delta_mixer,
    serves_apply_pending,
    serves_gated_delta_mixer,
)
from qnext.ops.cpu.matrices import (
    combine_experts,
    experts_swiglu,
    fits_experts,
    fits_linear,
    linear,
    serves_combine_experts,
    serves_experts_swiglu,
    serves_linear,
)
from qnext.ops.cpu.rounding import round_to_groups, rounding_errors, serves_round_to_groups, serves_rounding_errors
from qnext.ops.cpu.rows import (
    add,
    are_finite,
    argmax,
    concat,
    embedding,
    put_rows,
    rms_norm,
    rope_cos_sin,
    route,
    serves_add,
    serves_are_finite,
    serves_argmax,
    serves_concat,
    serves_embedding,
    serves_put_rows,
    serves_rms_norm,
    serves_rope_cos_sin,
    serves_route,
    serves_swiglu,
    swiglu,
)
from qnext.ops.cpu.train_weights import cross_entropy_sum, serves_cross_entropy_sum

__all__ = [
    "add",
    "apply_pending",
    "are_finite",
    "argmax",
    "attention_mixer",
    "combine_experts",
    "concat",
    "cross_entropy_sum",
    "embedding",
    "experts_swiglu",
    "fits_attention_mixer",
    "fits_drafts",
    "fits_experts",
    "fits_gated_delta_mixer",
    "fits_linear",
    "fits_pages",
    "gated_delta_mixer",
    "linear",
    "put_rows",
    "rms_norm",
    "rope_cos_sin",
    "round_to_groups",
    "rounding_errors",
    "route",
    "serves_add",
    "serves_apply_pending",
    "serves_are_finite",
    "serves_argmax",
    "serves_attention_mixer",
    "serves_combine_experts",
    "serves_concat",
    "serves_cross_entropy_sum",
    "serves_embedding",
    "serves_experts_swiglu",
    "serves_gated_delta_mixer",
    "serves_linear",
    "serves_put_rows",
    "serves_rms_norm",
    "serves_rope_cos_sin",
    "serves_round_to_groups",
    "serves_rounding_errors",
    "serves_route",
    "serves_swiglu",
    "swiglu",
]
