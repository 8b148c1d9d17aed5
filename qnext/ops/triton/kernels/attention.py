"""Gated attention between its projections, over pages: heads, attention by parts of the context, and their sum.

Legend: N sequences, H query heads, G KV heads, K head dim, P tokens in a page, S keys, M rows of queries: the query
heads of a KV head, token by token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """The nearest whole number, the even one of two, for numbers below 2 ** 22: beyond it fp32 has no fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def normed_and_rotated(x_ptr, weight_ptr, cos_ptr, sin_ptr, at_K, head_dim, half, eps, ZERO_CENTERED: tl.constexpr):
    """One head: its norm, then the rotation of the pairs (i, i + half) of its first dims."""
    is_in_K, is_rotated_K = at_K < head_dim, at_K < 2 * half
    partner_K = tl.where(at_K < half, at_K + half, at_K - half)
    angle_K = tl.where(at_K < half, at_K, at_K - half)
    x_K = tl.load(x_ptr + at_K, mask=is_in_K, other=0.0).to(tl.float32)
    other_K = tl.load(x_ptr + partner_K, mask=is_rotated_K, other=0.0).to(tl.float32)
    weight_K = tl.load(weight_ptr + at_K, mask=is_in_K, other=0.0).to(tl.float32)
    other_weight_K = tl.load(weight_ptr + partner_K, mask=is_rotated_K, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight_K += 1.0
        other_weight_K += 1.0
    root = tl.sqrt(tl.sum(x_K * x_K, axis=0) / head_dim + eps)
    y_K, other_K = x_K / root * weight_K, other_K / root * other_weight_K
    cos_K = tl.load(cos_ptr + angle_K, mask=is_rotated_K, other=1.0)
    sin_K = tl.load(sin_ptr + angle_K, mask=is_rotated_K, other=0.0)
    return y_K * cos_K + tl.where(at_K < half, -other_K, other_K) * sin_K


@triton.jit
def put_head(x_K, pages_ptr, scales_ptr, place, is_place, at_K, head_dim, HAS_SCALES: tl.constexpr):
    """Writes keys or values of one token and head; with scales as codes of int8."""
    if HAS_SCALES:
        scale = tl.max(tl.abs(x_K), axis=0) / 127.0
        tl.store(scales_ptr + place, scale, mask=is_place)
        x_K = nearest(x_K / tl.maximum(scale, 1.1754943508222875e-38))
        x_K = tl.minimum(tl.maximum(x_K, -127.0), 127.0)
    tl.store(pages_ptr + place * head_dim + at_K, x_K.to(pages_ptr.dtype.element_ty), mask=is_place & (at_K < head_dim))


@triton.jit
def attention_heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    write_index_ptr,
    q_out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_heads,
    num_kv_heads,
    head_dim,
    half,
    page_size,
    num_pages,
    eps,
    ZERO_CENTERED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One head of one token: a query ready for products, or a key or value into its place in the pages.

    Outside the pages nothing is written, and the query becomes NaN.
    """
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_K = tl.arange(0, BLOCK_K)
    cos_ptr += t * half
    sin_ptr += t * half
    index = tl.load(write_index_ptr + t)
    is_place = (index >= 0) & (index // page_size < num_pages)
    if c < num_heads:
        width = head_dim * 2 if HAS_GATE else head_dim
        x_ptr = q_ptr + t * q_stride + c * width
        y_K = normed_and_rotated(x_ptr, q_norm_ptr, cos_ptr, sin_ptr, at_K, head_dim, half, eps, ZERO_CENTERED)
        y_K = tl.where(is_place, y_K, float("nan"))
        at = q_out_ptr + (t * num_heads + c) * head_dim + at_K
        tl.store(at, y_K.to(q_out_ptr.dtype.element_ty), mask=at_K < head_dim)
    else:
        g = (c - num_heads) % num_kv_heads
        place = (index // page_size * num_kv_heads + g) * page_size + index % page_size
        if c < num_heads + num_kv_heads:
            x_ptr = k_ptr + t * k_stride + g * head_dim
            y_K = normed_and_rotated(x_ptr, k_norm_ptr, cos_ptr, sin_ptr, at_K, head_dim, half, eps, ZERO_CENTERED)
            put_head(y_K, k_pages_ptr, k_scales_ptr, place, is_place, at_K, head_dim, HAS_SCALES)
        else:
            x_K = tl.load(v_ptr + t * v_stride + g * head_dim + at_K, mask=at_K < head_dim, other=0.0).to(tl.float32)
            put_head(x_K, v_pages_ptr, v_scales_ptr, place, is_place, at_K, head_dim, HAS_SCALES)


@triton.jit
def tile_at(tile, starts_ptr, num_sequences, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sequence of a tile, and its first token there."""
    at_N = tl.arange(0, BLOCK_N)
    lengths_N = tl.load(starts_ptr + at_N + 1, mask=at_N < num_sequences, other=0)
    lengths_N -= tl.load(starts_ptr + at_N, mask=at_N < num_sequences, other=0)
    tiles_N = (lengths_N.to(tl.int32) + TOKENS - 1) // TOKENS
    ends_N = tl.cumsum(tiles_N, axis=0)
    n = tl.minimum(tl.sum((ends_N <= tile).to(tl.int32), axis=0), num_sequences - 1)
    return n, (tile - tl.sum(tl.where(at_N == n, ends_N - tiles_N, 0), axis=0)) * TOKENS


@triton.jit
def paged_attention_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    tables_ptr,
    contexts_ptr,
    starts_ptr,
    sums_ptr,
    stats_ptr,
    table_stride,
    num_sequences,
    num_heads,
    num_kv_heads,
    head_dim,
    page_size,
    num_pages,
    table_width,
    scale,
    GROUP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some tokens of a sequence with the query heads of one KV head, over one part of the keys.

    Tiles of `TOKENS` tokens are numbered through all sequences, whose lengths are read here: a recorded launch serves
    any. A tile behind the last one has no rows. A key outside the table or the pages is NaN.
    """
    tile, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, first = tile_at(tile, starts_ptr, num_sequences, TOKENS, BLOCK_N)
    start = tl.load(starts_ptr + n)
    length = (tl.load(starts_ptr + n + 1) - start).to(tl.int32)
    context = tl.load(contexts_ptr + n).to(tl.int32)
    at_M, at_S, at_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    token_M, head_M = first + at_M // GROUP, g * GROUP + at_M % GROUP
    is_row_M = (at_M < TOKENS * GROUP) & (token_M < length)
    row_M = (start + token_M) * num_heads + head_M
    is_in_K = at_K < head_dim
    q_MK = tl.load(q_ptr + row_M[:, None] * head_dim + at_K, mask=is_row_M[:, None] & is_in_K, other=0.0)
    num_keys = tl.where(first < length, context - length + tl.minimum(first + TOKENS, length), 0)
    of_split = tl.cdiv(tl.cdiv(num_keys, BLOCK_S), NUM_SPLITS) * BLOCK_S
    end = tl.minimum(num_keys, (split + 1) * of_split)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    sum_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for s in range(split * of_split, end, BLOCK_S):
        is_key_S = s + at_S < end
        column_S = (s + at_S) // page_size
        page_S = tl.load(tables_ptr + n * table_stride + column_S, mask=is_key_S & (column_S < table_width), other=-1)
        is_page_S = is_key_S & (page_S >= 0) & (page_S < num_pages)
        place_S = (page_S * num_kv_heads + g) * page_size + (s + at_S) % page_size
        is_in_SK = is_page_S[:, None] & is_in_K[None, :]
        k_SK = tl.load(k_pages_ptr + place_S[:, None] * head_dim + at_K, mask=is_in_SK, other=0)
        v_SK = tl.load(v_pages_ptr + place_S[:, None] * head_dim + at_K, mask=is_in_SK, other=0)
        if IS_WIDE:
            score_MS = tl.dot(q_MK.to(tl.float32), tl.trans(k_SK.to(tl.float32)), input_precision="tf32x3") * scale
        else:
            score_MS = tl.dot(q_MK, tl.trans(k_SK.to(q_MK.dtype))) * scale
        if HAS_SCALES:
            score_MS *= tl.load(k_scales_ptr + place_S, mask=is_page_S, other=0.0)[None, :]
        score_MS = tl.where(is_page_S[None, :], score_MS, float("nan"))
        is_seen_MS = is_key_S[None, :] & (s + at_S[None, :] <= (context - length + token_M)[:, None])
        score_MS = tl.where(is_seen_MS, score_MS, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MS, axis=1))
        held_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)  # of a row that sees nothing here
        weight_MS = tl.exp(score_MS - held_M[:, None])
        fade_M = tl.exp(top_M - held_M)
        total_M = total_M * fade_M + tl.sum(weight_MS, axis=1)
        if HAS_SCALES:
            weight_MS *= tl.load(v_scales_ptr + place_S, mask=is_page_S, other=0.0)[None, :]
        if IS_WIDE:
            part_MK = tl.dot(weight_MS, v_SK.to(tl.float32), input_precision="tf32x3")
        else:
            part_MK = tl.dot(weight_MS.to(q_MK.dtype), v_SK.to(q_MK.dtype))
        sum_MK = sum_MK * fade_M[:, None] + part_MK
        top_M = new_top_M
    at_M = row_M * NUM_SPLITS + split
    tl.store(sums_ptr + at_M[:, None] * head_dim + at_K, sum_MK, mask=is_row_M[:, None] & is_in_K)
    tl.store(stats_ptr + at_M * 2, top_M, mask=is_row_M)
    tl.store(stats_ptr + at_M * 2 + 1, total_M, mask=is_row_M)


@triton.jit
def attention_output_kernel(
    sums_ptr,
    stats_ptr,
    q_ptr,
    out_ptr,
    q_stride,
    num_heads,
    head_dim,
    HAS_GATE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One head of one token: the parts of its context added up, and the output gate."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_L, at_K = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_K)
    is_in_K = at_K < head_dim
    row_L = (t * num_heads + h) * NUM_SPLITS + at_L
    top_L, total_L = tl.load(stats_ptr + row_L * 2), tl.load(stats_ptr + row_L * 2 + 1)
    weight_L = tl.exp(top_L - tl.max(top_L, axis=0))
    sum_LK = tl.load(sums_ptr + row_L[:, None] * head_dim + at_K, mask=is_in_K[None, :], other=0.0)
    y_K = tl.sum(sum_LK * weight_L[:, None], axis=0) / tl.sum(total_L * weight_L, axis=0)
    if HAS_GATE:
        gate_at = q_ptr + t * q_stride + (2 * h + 1) * head_dim + at_K
        y_K *= tl.sigmoid(tl.load(gate_at, mask=is_in_K, other=0.0).to(tl.float32))
    tl.store(out_ptr + (t * num_heads + h) * head_dim + at_K, y_K.to(out_ptr.dtype.element_ty), mask=is_in_K)
