"""Functions on tensors, with one signature per op in public and in every backend.

Nouns: Backend (facts for callers), Weight (stands for a matrix), Packing, the caches, the records. May import: no other
folder. It knows no configuration and no module. A new op: its formula in reference/, a tuned form in torch/ where that
is faster, a kernel and its `serves_` predicate in cpu/, its public function in dispatch.py or mixers.py. A new backend:
a folder beside cpu/, its facts in backends.py.
"""

from __future__ import annotations

from qnext.ops.backends import (
    Backend,
    activation_dtype,
    arithmetic_of,
    backend_of,
    compute_alone,
    cuda_computes,
    instruction_set,
    reads_fp8,
    set_num_threads,
)
from qnext.ops.caches import DELTA_CHUNK_SIZE, AttentionCache, DeltaCache, PendingTokens
from qnext.ops.checksums import crc32
from qnext.ops.cpu.panels import PanelWeight
from qnext.ops.cpu.record_weights import ExpertTable, RecordMatrix, RecordWeight
from qnext.ops.cpu.residency import (
    LayerRecords,
    RecordError,
    RecordReader,
    Residency,
    StreamedExperts,
    aligned_bytes,
    time_reads,
)
from qnext.ops.dispatch import (
    add,
    add_experts,
    add_linear,
    are_finite,
    argmax,
    combine_experts,
    concat,
    cross_entropy_sum,
    embedding,
    experts_swiglu,
    linear,
    lora_experts_swiglu,
    normed_linears,
    normed_route,
    put_rows,
    rms_norm,
    rope_cos_sin,
    route,
    swiglu,
)
from qnext.ops.float8 import Fp8Weight
from qnext.ops.hosted import BringsExperts, BroughtExperts, HostedWeight
from qnext.ops.inference_forward import in_this_mode, inference_forward
from qnext.ops.invariance import (
    attention_keeps_bits,
    caches_keep_bits,
    delta_keeps_bits,
    experts_keep_bits,
    linear_keeps_bits,
)
from qnext.ops.likelihood import log_normalizer, token_log_probs
from qnext.ops.memory import empty_huge, keep_freed_memory, touch
from qnext.ops.mixers import apply_pending, attention_mixer, gated_delta_mixer, gated_delta_rule
from qnext.ops.packing import Packing
from qnext.ops.quantized import QuantizedWeight
from qnext.ops.recording import ParameterWatch, Recording, record
from qnext.ops.records import (
    AttentionWeights,
    ConvOutput,
    DeltaInputs,
    DeltaWeights,
    ExpertsLora,
    LowRank,
    MadeByShared,
    Norm,
    NormedLinears,
    NormedRoute,
    Rope,
    Routing,
    SharedExpert,
)
from qnext.ops.reference.rope import apply_rope, rope_frequencies, yarn_frequencies
from qnext.ops.rounding import round_to_groups, rounding_errors
from qnext.ops.storage import empty_fp8, empty_hosted, empty_quantized, write_quantized
from qnext.ops.torch.attention import attention, cached_attention
from qnext.ops.torch.conv import causal_conv1d_silu
from qnext.ops.torch.delta_cache import Carried, read_carried
from qnext.ops.torch.delta_mixer import cached_delta_rule, delta_gates, split_qkvz
from qnext.ops.torch.head import rows_of_logits
from qnext.ops.torch.norm import gated_rms_norm, l2_norm
from qnext.ops.weights import Weight, dequantize

__all__ = [
    "DELTA_CHUNK_SIZE",
    "AttentionCache",
    "AttentionWeights",
    "Backend",
    "BringsExperts",
    "BroughtExperts",
    "Carried",
    "ConvOutput",
    "DeltaCache",
    "DeltaInputs",
    "DeltaWeights",
    "ExpertTable",
    "ExpertsLora",
    "Fp8Weight",
    "HostedWeight",
    "LayerRecords",
    "LowRank",
    "MadeByShared",
    "Norm",
    "NormedLinears",
    "NormedRoute",
    "Packing",
    "PanelWeight",
    "ParameterWatch",
    "PendingTokens",
    "QuantizedWeight",
    "RecordError",
    "RecordMatrix",
    "RecordReader",
    "RecordWeight",
    "Recording",
    "Residency",
    "Rope",
    "Routing",
    "SharedExpert",
    "StreamedExperts",
    "Weight",
    "activation_dtype",
    "add",
    "add_experts",
    "add_linear",
    "aligned_bytes",
    "apply_pending",
    "apply_rope",
    "are_finite",
    "argmax",
    "arithmetic_of",
    "attention",
    "attention_keeps_bits",
    "attention_mixer",
    "backend_of",
    "cached_attention",
    "cached_delta_rule",
    "caches_keep_bits",
    "causal_conv1d_silu",
    "combine_experts",
    "compute_alone",
    "concat",
    "crc32",
    "cross_entropy_sum",
    "cuda_computes",
    "delta_gates",
    "delta_keeps_bits",
    "dequantize",
    "embedding",
    "empty_fp8",
    "empty_hosted",
    "empty_huge",
    "empty_quantized",
    "experts_keep_bits",
    "experts_swiglu",
    "gated_delta_mixer",
    "gated_delta_rule",
    "gated_rms_norm",
    "in_this_mode",
    "inference_forward",
    "instruction_set",
    "keep_freed_memory",
    "l2_norm",
    "linear",
    "linear_keeps_bits",
    "log_normalizer",
    "lora_experts_swiglu",
    "normed_linears",
    "normed_route",
    "put_rows",
    "read_carried",
    "reads_fp8",
    "record",
    "rms_norm",
    "rope_cos_sin",
    "rope_frequencies",
    "round_to_groups",
    "rounding_errors",
    "route",
    "rows_of_logits",
    "set_num_threads",
    "split_qkvz",
    "swiglu",
    "time_reads",
    "token_log_probs",
    "touch",
    "write_quantized",
    "yarn_frequencies",
]
