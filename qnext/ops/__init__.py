"""Functions on tensors. One public signature per op; they know no configuration and no module."""

from __future__ import annotations

from qnext.ops.attention_mixer import attention_mixer
from qnext.ops.packing import Packing
from qnext.ops.reference.attention import attention, paged_attention, write_kv
from qnext.ops.reference.attention_mixer import AttentionCache
from qnext.ops.reference.conv import causal_conv1d_silu
from qnext.ops.reference.delta import (
    DELTA_CHUNK_SIZE,
    chunk_gated_delta_rule,
    gated_delta_rule,
    recurrent_gated_delta_rule,
)
from qnext.ops.reference.linear import linear
from qnext.ops.reference.moe import Routing, experts_swiglu, route, swiglu
from qnext.ops.reference.norm import gated_rms_norm, l2_norm, rms_norm
from qnext.ops.reference.rope import apply_rope, rope_cos_sin, rope_frequencies, yarn_frequencies

__all__ = [
    "DELTA_CHUNK_SIZE",
    "AttentionCache",
    "Packing",
    "Routing",
    "apply_rope",
    "attention",
    "attention_mixer",
    "causal_conv1d_silu",
    "chunk_gated_delta_rule",
    "experts_swiglu",
    "gated_delta_rule",
    "gated_rms_norm",
    "l2_norm",
    "linear",
    "paged_attention",
    "recurrent_gated_delta_rule",
    "rms_norm",
    "rope_cos_sin",
    "rope_frequencies",
    "route",
    "swiglu",
    "write_kv",
    "yarn_frequencies",
]
