"""The token mixer of gated full attention, between its projections.

Legend: T tokens, N sequences, M pages of a sequence, H query heads, G KV heads, K head dim, P tokens in a page,
X = H * K (2 * H * K with gates), Y = G * K, R rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.reference.attention import attention, paged_attention, write_kv
from qnext.ops.reference.norm import rms_norm
from qnext.ops.reference.rope import apply_rope


class AttentionCache(NamedTuple):
    """Pages of one layer and where a step reads and writes them.

    Pages are [num_pages, G, P, K] in fp32, bf16 or int8. With int8, a number is its code times the scale of its token
    and KV head, which lies in [num_pages, G, P] fp32.
    """

    k_pages: Tensor
    v_pages: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    block_tables_NM: Tensor  # int64 page numbers in order, padded with any valid page
    context_lengths_N: Tensor  # int64 on the CPU: tokens of each sequence, this step included
    write_index_T: Tensor  # int64 page * P + offset for every token of the step


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
    """[T, H * K]: from the outputs of the projections q, k, v to the input of the projection o.

    Queries and keys are normalised per head, their first R dims rotated by cos and sin [T, R / 2], and each query
    attends causally to its sequence: to the tokens of the call, or with a cache to its pages, where the new keys and
    values are written first. With `has_gate` each head of q holds its query dims and then its gate dims, and the
    output is multiplied by sigmoid(gate).
    """
    num_tokens, head_dim = q_TX.shape[0], q_norm_weight_K.shape[0]
    q_THK = q_TX.view(num_tokens, -1, head_dim * (2 if has_gate else 1))
    gate_THK = None
    if has_gate:
        q_THK, gate_THK = q_THK.chunk(2, dim=-1)
    k_TGK, v_TGK = k_TY.view(num_tokens, -1, head_dim), v_TY.view(num_tokens, -1, head_dim)
    q_THK = apply_rope(rms_norm(q_THK, q_norm_weight_K, eps=eps, zero_centered=zero_centered), cos, sin)
    k_TGK = apply_rope(rms_norm(k_TGK, k_norm_weight_K, eps=eps, zero_centered=zero_centered), cos, sin)
    if cache is None:
        out_THK = attention(q_THK, k_TGK, v_TGK, packing=packing, scale=scale)
    else:
        out_THK = _cached_attention(q_THK, k_TGK, v_TGK, cache, packing, scale)
    if gate_THK is not None:
        out_THK = out_THK * torch.sigmoid(gate_THK)
    return out_THK.flatten(1)


def _cached_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cache: AttentionCache, packing: Packing, scale: float
) -> Tensor:
    k_pages, v_pages, tables_NM = cache.k_pages, cache.v_pages, cache.block_tables_NM
    if cache.k_scales is None or cache.v_scales is None:
        write_kv(k_TGK, v_TGK, k_pages, v_pages, write_index_T=cache.write_index_T)
    else:
        _write_codes(k_TGK, k_pages, cache.k_scales, cache.write_index_T)
        _write_codes(v_TGK, v_pages, cache.v_scales, cache.write_index_T)
        k_pages = _read_codes(k_pages, cache.k_scales, tables_NM)
        v_pages = _read_codes(v_pages, cache.v_scales, tables_NM)
        tables_NM = torch.arange(tables_NM.numel(), device=tables_NM.device).view(tables_NM.shape)
    return paged_attention(
        q_THK, k_pages, v_pages, packing=packing, block_tables_NM=tables_NM,
        context_lengths=tuple(cache.context_lengths_N.tolist()), scale=scale,
    )  # fmt: skip


def _write_codes(x_TGK: Tensor, pages: Tensor, scales: Tensor, write_index_T: Tensor) -> None:
    x_TGK = x_TGK.float()
    scales_TG = x_TGK.abs().amax(-1) / 127
    codes = (x_TGK / scales_TG[..., None].clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    pages_T, offsets_T = write_index_T // pages.shape[2], write_index_T % pages.shape[2]
    pages[pages_T, :, offsets_T] = codes.to(torch.int8)
    scales[pages_T, :, offsets_T] = scales_TG


def _read_codes(pages: Tensor, scales: Tensor, tables_NM: Tensor) -> Tensor:
    """The pages of the tables alone, in their order, as fp32."""
    used = tables_NM.flatten()
    return pages.index_select(0, used).float() * scales.index_select(0, used)[..., None]
