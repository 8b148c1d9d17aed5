"""GPU kernels in Triton, for inference and training. The wrappers check shapes and then start the programs in kernels/.

Nouns: SelfTest, what a kernel must pass on a device before it serves there. May import: ops/reference, ops/torch and
the files of ops beside it. Triton is imported when a kernel first runs. A new op: its program in kernels/, its wrapper
with a predicate `serves_...` and a self-test `try_...`, all three listed here.
"""

from __future__ import annotations

from qnext.ops.triton.attention import attention_mixer, serves_attention_mixer, try_attention_mixer
from qnext.ops.triton.delta import gated_delta_mixer, serves_gated_delta_mixer, try_gated_delta_step
from qnext.ops.triton.delta_chunks import chunked_delta_rule, try_gated_delta_chunks
from qnext.ops.triton.delta_prompts import try_gated_delta_prompt
from qnext.ops.triton.experts import (
    add_experts,
    experts_swiglu,
    serves_add_experts,
    serves_experts_swiglu,
    try_experts_swiglu,
)
from qnext.ops.triton.matrices import (
    add_linear,
    linear,
    normed_linears,
    serves_add_linear,
    serves_linear,
    serves_normed_linears,
    try_linear,
    try_normed_linears,
)
from qnext.ops.triton.outside import Package, piece_attention, prompt_rule, training_rule
from qnext.ops.triton.router import (
    normed_route,
    route,
    serves_normed_route,
    serves_route,
    try_normed_route,
    try_route,
)
from qnext.ops.triton.rows import (
    rms_norm,
    rope_cos_sin,
    serves_rms_norm,
    serves_rope_cos_sin,
    try_rms_norm,
    try_rms_norm_gradient,
    try_rope_cos_sin,
)
from qnext.ops.triton.train_attention import try_attention_gradient
from qnext.ops.triton.train_delta import gated_delta_rule, serves_gated_delta_rule, try_gated_delta_gradient
from qnext.ops.triton.train_experts import serves_swiglu, swiglu, try_experts_gradient, try_swiglu_gradient
from qnext.ops.triton.train_mixer import try_delta_mixer_gradient
from qnext.ops.triton.trust import SelfTest, is_trusted, self_test_error

SELF_TESTS: tuple[SelfTest, ...] = (
    try_rms_norm,
    try_rms_norm_gradient,
    try_rope_cos_sin,
    try_route,
    try_normed_route,
    try_gated_delta_step,
    try_gated_delta_chunks,
    try_gated_delta_prompt,
    try_gated_delta_gradient,
    try_delta_mixer_gradient,
    try_attention_mixer,
    try_attention_gradient,
    try_linear,
    try_normed_linears,
    try_experts_swiglu,
    try_swiglu_gradient,
    try_experts_gradient,
)

__all__ = [
    "SELF_TESTS",
    "Package",
    "SelfTest",
    "add_experts",
    "add_linear",
    "attention_mixer",
    "chunked_delta_rule",
    "experts_swiglu",
    "gated_delta_mixer",
    "gated_delta_rule",
    "is_trusted",
    "linear",
    "normed_linears",
    "normed_route",
    "piece_attention",
    "prompt_rule",
    "rms_norm",
    "rope_cos_sin",
    "route",
    "self_test_error",
    "serves_add_experts",
    "serves_add_linear",
    "serves_attention_mixer",
    "serves_experts_swiglu",
    "serves_gated_delta_mixer",
    "serves_gated_delta_rule",
    "serves_linear",
    "serves_normed_linears",
    "serves_normed_route",
    "serves_rms_norm",
    "serves_rope_cos_sin",
    "serves_route",
    "serves_swiglu",
    "swiglu",
    "training_rule",
]
