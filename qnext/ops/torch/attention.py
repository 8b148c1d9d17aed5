"""Causal grouped-query attention over packed sequences and over paged keys and values, and the mixer around it.

Legend: T tokens, N sequences, M pages of a sequence, L longest query, S longest context, H query heads, G KV heads,
K head dim, P tokens in a page, X = H * K (2 * H * K with gates), Y = G * K, R rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.caches import AttentionCache
from qnext.ops.checks import check_attention
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, Rope
from qnext.ops.reference.rope import apply_rope
from qnext.ops.torch.norm import rms_norm


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *, packing: Packing, scale: float) -> Tensor:
    """[T, H, K]: causal attention inside each packed sequence. Query head h reads KV head h // (H / G).

    Sequences of similar lengths are padded on the right and computed together. Under a causal mask no token sees the
    padding behind it, so nothing else has to be masked.
    """
    if packing.is_uniform:
        q, k, v = (x.view(packing.num_sequences, packing.max_length, *x.shape[1:]) for x in (q_THK, k_TGK, v_TGK))
        return _causal_attention(q, k, v, scale).flatten(0, 1)
    outputs = []
    for rows_NL in packing.padded_groups:
        q, k, v = (x.index_select(0, rows_NL.flatten()).unflatten(0, rows_NL.shape) for x in (q_THK, k_TGK, v_TGK))
        outputs.append(_causal_attention(q, k, v, scale).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.grouped_rows_T)


def _causal_attention(q_NLHK: Tensor, k_NLGK: Tensor, v_NLGK: Tensor, scale: float) -> Tensor:
    """[N, L, H, K]"""
    q, k, v = (x.transpose(1, 2) for x in (q_NLHK, k_NLGK, v_NLGK))
    is_causal, use_gqa = q.shape[2] > 1, q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=use_gqa)
    return out.transpose(1, 2)


def write_kv(k_TGK: Tensor, v_TGK: Tensor, k_pages: Tensor, v_pages: Tensor, *, write_index_T: Tensor) -> None:
    """Store keys and values at flat places (page * P + offset) of pages [num_pages, G, P, K], in place."""
    page_size = k_pages.shape[2]
    pages_T, offsets_T = write_index_T // page_size, write_index_T % page_size
    k_pages[pages_T, :, offsets_T] = k_TGK.to(k_pages.dtype)
    v_pages[pages_T, :, offsets_T] = v_TGK.to(v_pages.dtype)


def paged_attention(
    q_THK: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    packing: Packing,
    block_tables_NM: Tensor,
    context_lengths: tuple[int, ...],
    scale: float,
) -> Tensor:
    """[T, H, K]: the queries of each sequence are its last tokens. They see its pages causally, themselves included.

    `block_tables_NM` names the pages of each sequence in order. `context_lengths` counts the tokens in them.
    """
    if packing.max_length == 1:
        return _decode_attention(q_THK, k_pages, v_pages, block_tables_NM, context_lengths, scale)
    outputs, start = [], 0
    for n, (length, context) in enumerate(zip(packing.lengths, context_lengths, strict=True)):
        k, v = (_read_pages(pages, block_tables_NM[n], context) for pages in (k_pages, v_pages))
        q = q_THK[start : start + length].transpose(0, 1)[None]
        outputs.append(_suffix_attention(q, k, v, scale)[0].transpose(0, 1))
        start += length
    return torch.cat(outputs)


def _read_pages(pages: Tensor, table_M: Tensor, context: int) -> Tensor:
    """[1, G, S, K] of one sequence."""
    num_pages = -(-context // pages.shape[2])
    rows = pages.index_select(0, table_M[:num_pages]).transpose(0, 1).flatten(1, 2)
    return rows[None, :, :context]


def _suffix_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last L positions over all S positions: query i sees keys up to S - L + i."""
    length, context = q.shape[2], k.shape[2]
    k, v = k.to(q.dtype), v.to(q.dtype)
    use_gqa = q.shape[1] != k.shape[1]
    if length == context or length == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, scale=scale, enable_gqa=use_gqa)
    visible = torch.ones(length, context, dtype=torch.bool, device=q.device).tril(context - length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=use_gqa)


def _decode_attention(
    q_THK: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables_NM: Tensor,
    context_lengths: tuple[int, ...],
    scale: float,
) -> Tensor:
    """One query per sequence: all contexts gathered, padded to the longest, and masked."""
    page_size = k_pages.shape[2]
    tables = block_tables_NM[:, : -(-max(context_lengths) // page_size)]
    longest = tables.shape[1] * page_size
    k, v = (
        pages.index_select(0, tables.flatten()).unflatten(0, tables.shape).transpose(1, 2).flatten(2, 3)
        for pages in (k_pages, v_pages)
    )
    contexts_N = torch.tensor(context_lengths, device=q_THK.device)
    visible = torch.arange(longest, device=q_THK.device) < contexts_N[:, None]
    # A page may hold another owner's leftovers behind the context: weights of zero would keep its NaN.
    v = torch.where(visible[:, None, :, None], v, 0.0)
    k = torch.where(visible[:, None, :, None], k, 0.0)
    q, k, v = q_THK[:, :, None], k.to(q_THK.dtype), v.to(q_THK.dtype)
    use_gqa, mask = q.shape[1] != k.shape[1], visible[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=use_gqa).squeeze(2)


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
    """See ops.attention_mixer."""
    check_attention(q_TX, k_TY, v_TY, weights, rope, packing)
    num_tokens, head_dim = q_TX.shape[0], weights.head_dim
    norm: dict[str, Any] = {"eps": weights.eps, "zero_centered": weights.zero_centered}
    q_THK = q_TX.view(num_tokens, -1, head_dim * (2 if weights.has_gate else 1))
    gate_THK = None
    if weights.has_gate:
        q_THK, gate_THK = q_THK.chunk(2, dim=-1)
    k_TGK, v_TGK = k_TY.view(num_tokens, -1, head_dim), v_TY.view(num_tokens, -1, head_dim)
    q_THK = apply_rope(rms_norm(q_THK, weights.q_norm_weight_K, **norm), rope)
    k_TGK = apply_rope(rms_norm(k_TGK, weights.k_norm_weight_K, **norm), rope)
    if cache is None:
        out_THK = attention(q_THK, k_TGK, v_TGK, packing=packing, scale=weights.scale)
    else:
        out_THK = cached_attention(q_THK, k_TGK, v_TGK, cache, packing=packing, scale=weights.scale)
    if gate_THK is not None:
        out_THK = out_THK * torch.sigmoid(gate_THK)
    return out_THK.flatten(1)


def cached_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cache: AttentionCache, *, packing: Packing, scale: float
) -> Tensor:
    """[T, H, K]: as `attention`, over the pages of each sequence. The new keys and values are written into the pages
    first."""
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
        q_THK,
        k_pages,
        v_pages,
        packing=packing,
        block_tables_NM=tables_NM,
        context_lengths=tuple(cache.context_lengths_N.tolist()),
        scale=scale,
    )


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
