"""Causal grouped-query attention over packed sequences and over paged keys and values.

Legend: T tokens, N sequences, L longest query, S longest context, H query heads, G KV heads, K head dim,
P tokens in a page.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.packing import Packing


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *, packing: Packing, scale: float) -> Tensor:
    """[T, H, K]: causal attention inside each packed sequence; query head h reads KV head h // (H / G).

    Sequences are padded on the right to the longest. Under a causal mask no token sees the padding behind it, so
    nothing else needs to be masked.
    """
    q, k, v = (_pad(x, packing) for x in (q_THK, k_TGK, v_TGK))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=packing.max_length > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    rows = out.transpose(1, 2).flatten(0, 1)
    return rows if packing.is_uniform else rows.index_select(0, packing.padded_rows_T)


def _pad(x_THK: Tensor, packing: Packing) -> Tensor:
    """[T, H, K] -> [N, H, L, K]"""
    num_rows = packing.num_sequences * packing.max_length
    if not packing.is_uniform:
        x_THK = x_THK.new_zeros(num_rows, *x_THK.shape[1:]).index_copy(0, packing.padded_rows_T, x_THK)
    return x_THK.view(packing.num_sequences, packing.max_length, *x_THK.shape[1:]).transpose(1, 2)


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
    """[T, H, K]: the queries of each sequence are its last tokens and see its pages, themselves included, causally.

    `block_tables_NM` names the pages of each sequence in order; `context_lengths` counts the tokens that lie in them.
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
    q_THK: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables_NM: Tensor, context_lengths: tuple[int, ...],
    scale: float,
) -> Tensor:  # fmt: skip
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
    out = F.scaled_dot_product_attention(
        q_THK[:, :, None], k.to(q_THK.dtype), v.to(q_THK.dtype), attn_mask=visible[:, None, None, :], scale=scale,
        enable_gqa=q_THK.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.squeeze(2)
