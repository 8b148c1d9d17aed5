"""Causal grouped-query attention, and the mixer around it.

Legend: T tokens of a call, L of a sequence, S its context, H query heads, G KV heads, K head dim, P tokens in a page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.caches import AttentionCache
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, Rope
from qnext.ops.reference.norm import rms_norm
from qnext.ops.reference.rope import apply_rope
from qnext.ops.reference.width import wide


def attention_mixer(
    q_TX: Tensor,
    k_TY: Tensor,
    v_TY: Tensor,
    weights: AttentionWeights,
    *,
    rope: Rope,
    packing: Packing,
    cache: AttentionCache | None = None,
) -> Tensor:
    """Norm and rotation of queries and keys per head, attention, output gate. See ops.attention_mixer."""
    norm: dict[str, Any] = {"eps": weights.eps, "zero_centered": weights.zero_centered}
    q_THK, k_TGK, v_TGK = (x.unflatten(1, (-1, weights.head_dim)) for x in (q_TX, k_TY, v_TY))
    gate_THK = None
    if weights.has_gate:  # each head holds its query, then its gate
        q_THK, gate_THK = q_THK[:, 0::2], q_THK[:, 1::2]
    q_THK = apply_rope(rms_norm(q_THK, weights.q_norm_weight_K, **norm), rope)
    k_TGK = apply_rope(rms_norm(k_TGK, weights.k_norm_weight_K, **norm), rope)
    if cache is None:
        out_THK = attention(q_THK, k_TGK, v_TGK, packing=packing, scale=weights.scale)
    else:
        write(k_TGK, cache.k_pages, cache.k_scales, cache.write_index_T)
        write(v_TGK, cache.v_pages, cache.v_scales, cache.write_index_T)
        out_THK = paged_attention(q_THK, cache, packing=packing, scale=weights.scale)
    return (out_THK if gate_THK is None else out_THK * torch.sigmoid(gate_THK)).flatten(1)


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *, packing: Packing, scale: float) -> Tensor:
    """[T, H, K]: causal inside each packed sequence."""
    sequences = zip(*(x.split(packing.lengths) for x in (q_THK, k_TGK, v_TGK)), strict=True)
    return torch.cat([attend(q, k, v, scale) for q, k, v in sequences])


def paged_attention(q_THK: Tensor, cache: AttentionCache, *, packing: Packing, scale: float) -> Tensor:
    """[T, H, K]: the queries of each sequence are its last tokens and see its pages."""
    parts = []
    contexts = cache.context_lengths_N.tolist()
    for q_LHK, table_M, context in zip(q_THK.split(packing.lengths), cache.block_tables_NM, contexts, strict=True):
        k_SGK = read(cache.k_pages, cache.k_scales, table_M)[:context]
        v_SGK = read(cache.v_pages, cache.v_scales, table_M)[:context]
        parts.append(attend(q_LHK, k_SGK, v_SGK, scale))
    return torch.cat(parts)


def attend(q_LHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys up to each query's own; query head h reads KV head h // (H / G)."""
    repeats = q_LHK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = (wide(x.repeat_interleave(repeats, dim=1)).to(wide(q_LHK).dtype) for x in (k_SGK, v_SGK))
    scores_HLS = scale * torch.einsum("lhk,shk->hls", wide(q_LHK), k_SHK)
    is_visible_LS = torch.ones_like(scores_HLS[0], dtype=torch.bool).tril(len(k_SHK) - len(q_LHK))
    probabilities_HLS = scores_HLS.masked_fill(~is_visible_LS, -torch.inf).softmax(-1)
    return torch.einsum("hls,shk->lhk", probabilities_HLS, v_SHK).to(q_LHK.dtype)


def write(x_TGK: Tensor, pages: Tensor, scales: Tensor | None, index_T: Tensor) -> None:
    """Puts keys or values at places page * P + offset, in the dtype of the pages.

    In int8 a number is code * scale. The largest magnitude of a token and head has the code 127.
    """
    page_T, offset_T = index_T // pages.shape[2], index_T % pages.shape[2]
    if scales is not None:
        scale_TG = wide(x_TGK).abs().amax(-1) / 127
        scales[page_T, :, offset_T] = scale_TG.to(scales.dtype)
        x_TGK = (wide(x_TGK) / scale_TG.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-127, 127)
    pages[page_T, :, offset_T] = x_TGK.to(pages.dtype)


def read(pages: Tensor, scales: Tensor | None, table_M: Tensor) -> Tensor:
    """[M * P, G, K]: the contents of the pages of a sequence, in order."""
    found = wide(pages[table_M]) if scales is None else pages[table_M] * scales[table_M][..., None]
    return found.transpose(1, 2).flatten(0, 1)
