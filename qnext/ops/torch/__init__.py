"""Every op in tuned PyTorch: chunked, grouped, with hand-written backward. It serves every call that no kernel takes.

Nouns: none of its own. ops/reference defines what an op means; ops that need no tuning come from there. May import:
ops/reference and the files of ops beside it; no kernel. A new op: the same name and arguments as in ops/reference,
listed here.
"""

from __future__ import annotations

from qnext.ops.reference.matrices import combine_experts
from qnext.ops.reference.rope import rope_cos_sin
from qnext.ops.reference.rows import add, are_finite, argmax, concat, embedding, put_rows, swiglu
from qnext.ops.torch.attention import attention_mixer
from qnext.ops.torch.delta import gated_delta_rule
from qnext.ops.torch.delta_cache import apply_pending
from qnext.ops.torch.delta_mixer import gated_delta_mixer
from qnext.ops.torch.head import cross_entropy_sum
from qnext.ops.torch.lora import lora_experts_swiglu
from qnext.ops.torch.matrices import linear
from qnext.ops.torch.moe import experts_swiglu, route
from qnext.ops.torch.norm import rms_norm
from qnext.ops.torch.rounding import round_to_groups, rounding_errors

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
    "gated_delta_mixer",
    "gated_delta_rule",
    "linear",
    "lora_experts_swiglu",
    "put_rows",
    "rms_norm",
    "rope_cos_sin",
    "round_to_groups",
    "rounding_errors",
    "route",
    "swiglu",
]
