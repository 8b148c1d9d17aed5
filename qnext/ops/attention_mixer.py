"""The token mixer of gated full attention: native where it serves, otherwise the reference.

Legend: T tokens, H query heads, G KV heads, K head dim, X = H * K (2 * H * K with gates), Y = G * K.
"""

from __future__ import annotations

from torch import Tensor

from qnext.ops.backend import runs_native
from qnext.ops.cpu import attention as native
from qnext.ops.packing import Packing
from qnext.ops.reference import attention_mixer as reference
from qnext.ops.reference.attention_mixer import AttentionCache


def attention_mixer(
    q_TX: Tensor,
    k_TY: Tensor,
    v_TY: Tensor,
    *,
    q_norm_weight_K: Tensor,
    k_norm_weight_K: Tensor,
    eps: float,
    zero_centered: bool,
    has_gate: bool,
    cos: Tensor,
    sin: Tensor,
    packing: Packing,
    scale: float,
    cache: AttentionCache | None,
) -> Tensor:
    """[T, H * K]: see the reference. Page numbers and places that do not fit the pages raise IndexError."""
    serves = runs_native(q_TX, k_TY, v_TY, q_norm_weight_K, k_norm_weight_K) and native.serves(
        q_norm_weight_K.shape[0], cache
    )
    mix = native.attention_mixer if serves else reference.attention_mixer
    return mix(
        q_TX, k_TY, v_TY, q_norm_weight_K=q_norm_weight_K, k_norm_weight_K=k_norm_weight_K, eps=eps,
        zero_centered=zero_centered, has_gate=has_gate, cos=cos, sin=sin, packing=packing, scale=scale, cache=cache,
    )  # fmt: skip
