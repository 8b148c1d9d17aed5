"""Functions on tensors. One public signature per op; they know no configuration and no module."""

from __future__ import annotations

from qnext.ops.attention_mixer import attention_mixer
from qnext.ops.backend import is_native, set_num_threads
from qnext.ops.cpu.panels import PanelWeight
from qnext.ops.delta_mixer import DeltaCache, PendingTokens, apply_pending, gated_delta_mixer
from qnext.ops.dispatch import (
    add,
    are_finite,
    argmax,
    concat,
    embedding,
    experts_swiglu,
    linear,
    put_rows,
    rms_norm,
    rope_cos_sin,
    route,
    swiglu,
)
from qnext.ops.memory import empty_huge, keep_freed_memory, touch
from qnext.ops.packing import Packing
from qnext.ops.quantized import QuantizedWeight
from qnext.ops.recording import ParameterWatch, Recording, record
from qnext.ops.reference.attention import attention, paged_attention, write_kv
from qnext.ops.reference.attention_mixer import AttentionCache
from qnext.ops.reference.conv import causal_conv1d_silu
from qnext.ops.reference.delta import (
    DELTA_CHUNK_SIZE,
    chunk_gated_delta_rule,
    gated_delta_rule,
    recurrent_gated_delta_rule,
)
from qnext.ops.reference.moe import Routing, SharedExpert
from qnext.ops.reference.norm import gated_rms_norm, l2_norm
from qnext.ops.reference.rope import apply_rope, rope_frequencies, yarn_frequencies
from qnext.ops.rounding import round_to_groups, rounding_errors
from qnext.ops.weights import Weight, dequantize, empty_quantized, write_quantized

__all__ = [
    "DELTA_CHUNK_SIZE",
    "AttentionCache",
    "DeltaCache",
    "Packing",
    "PanelWeight",
    "ParameterWatch",
    "PendingTokens",
    "QuantizedWeight",
    "Recording",
    "Routing",
    "SharedExpert",
    "Weight",
    "add",
    "apply_pending",
    "apply_rope",
    "are_finite",
    "argmax",
    "attention",
    "attention_mixer",
    "causal_conv1d_silu",
    "chunk_gated_delta_rule",
    "concat",
    "dequantize",
    "embedding",
    "empty_huge",
    "empty_quantized",
    "experts_swiglu",
    "gated_delta_mixer",
    "gated_delta_rule",
    "gated_rms_norm",
    "is_native",
    "keep_freed_memory",
    "l2_norm",
    "linear",
    "paged_attention",
    "put_rows",
    "record",
    "recurrent_gated_delta_rule",
    "rms_norm",
    "rope_cos_sin",
    "rope_frequencies",
    "round_to_groups",
    "rounding_errors",
    "route",
    "set_num_threads",
    "swiglu",
    "touch",
    "write_kv",
    "write_quantized",
    "yarn_frequencies",
]
