"""The attention mixer over pages by GPU kernels. Legend: see qnext.ops.mixers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.backends import is_interpreted
from qnext.ops.caches import AttentionCache
from qnext.ops.checks import check_attention
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, Rope
from qnext.ops.triton.outside import fits_piece_attention, piece_attention
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.train_attention import trained_attention_mixer, try_attention_gradient
from qnext.ops.triton.trust import is_trusted, num_processors, numbers, take, train, wants_gradients

_PAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_MAX_HEAD_DIM = 256
_MAX_ROWS = 64  # queries of a program: tokens times query heads of a KV head
_MAX_WIDE_ROWS = 16  # where operands are fp32, which need twice the memory and three times the products
_MAX_SEQUENCES = 4096
_MAX_SPLITS = 64


class _Tiles(NamedTuple):
    """How the work is shared out. It depends on no length that a replay may change."""

    tokens: int  # of a program
    num_tiles: int
    num_splits: int  # parts of the context
    block_keys: int


def serves_attention_mixer(
    q_TX: Tensor,
    k_TY: Tensor,
    v_TY: Tensor,
    weights: AttentionWeights,
    *,
    rope: Rope,
    packing: Packing,
    cache: AttentionCache | None = None,
) -> bool:
    """Whether the call reads and writes pages of a known kind, or wants gradients and has no pages."""
    tensors = (q_TX, k_TY, v_TY, weights.q_norm_weight_K, weights.k_norm_weight_K)
    if wants_gradients(*tensors):
        is_plain = cache is None and train(*tensors) and weights.head_dim <= _MAX_HEAD_DIM
        return is_plain and is_trusted(try_attention_gradient, q_TX.device)
    if cache is None or not take(*tensors):
        return False
    pages = (cache.k_pages, cache.v_pages)
    num_heads = q_TX.shape[1] // (weights.head_dim * (2 if weights.has_gate else 1))
    return (
        weights.head_dim <= _MAX_HEAD_DIM
        and num_heads // max(1, k_TY.shape[1] // weights.head_dim) <= _MAX_ROWS
        and packing.num_sequences <= _MAX_SEQUENCES
        and all(x.dtype in _PAGE_DTYPES and x.is_contiguous() for x in pages)
        and is_trusted(try_attention_mixer, q_TX.device)
    )


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
    """See ops.attention_mixer. Everything is fp32 but the operands of products, which have the dtype of q and k.

    A GPU is not waited for: a token whose place or pages are out of range becomes NaN and touches no other memory.
    Where another package attends for pieces of prompts, pages have to be in range, and what it returns is bf16.
    """
    from qnext.ops.triton.kernels.attention import attention_output_kernel

    check_attention(q_TX, k_TY, v_TY, weights, rope, packing)
    if wants_gradients(q_TX, k_TY, v_TY, weights.q_norm_weight_K, weights.k_norm_weight_K):
        return trained_attention_mixer(q_TX, k_TY, v_TY, weights, rope=rope, packing=packing)
    assert cache is not None, "ask whether it serves first"
    q_TX, k_TY, v_TY = (x if x.stride(1) == 1 else x.contiguous() for x in (q_TX, k_TY, v_TY))
    pages = (cache.k_pages, cache.v_pages, *_scales(cache))
    q_THK = _put_heads((q_TX, k_TY, v_TY), weights, rope, cache, pages)
    outside = piece_attention(q_THK.device) if fits_piece_attention(q_THK, cache, packing) else None
    if outside is None:
        sums, stats = _parts(q_THK, pages, cache, packing, weights.scale)
    else:
        sums = outside(q_THK, cache, packing=packing, scale=weights.scale)[:, :, None]
        stats = torch.zeros((*sums.shape[:3], 2), dtype=torch.float32, device=q_THK.device)
        stats[..., 1] = 1.0
    num_tokens, num_heads, head_dim = q_THK.shape
    out_TX = torch.empty((num_tokens, num_heads * head_dim), dtype=q_TX.dtype, device=q_TX.device)
    attention_output_kernel[(num_tokens, num_heads)](
        sums,
        stats,
        q_TX,
        out_TX,
        q_TX.stride(0),
        num_heads,
        head_dim,
        HAS_GATE=weights.has_gate,
        NUM_SPLITS=sums.shape[2],
        BLOCK_K=_block(head_dim),
        num_warps=4,
    )
    return out_TX


def _put_heads(
    rows: tuple[Tensor, Tensor, Tensor],
    weights: AttentionWeights,
    rope: Rope,
    cache: AttentionCache,
    pages: tuple[Tensor, ...],
) -> Tensor:
    """Queries [T, H, K], normalised and rotated. The new keys and values are in the pages then."""
    from qnext.ops.triton.kernels.attention import attention_heads_kernel

    q_TX = rows[0]
    num_tokens, head_dim, (num_kv_heads, page_size) = len(q_TX), weights.head_dim, cache.k_pages.shape[1:3]
    num_heads = q_TX.shape[1] // (head_dim * (2 if weights.has_gate else 1))
    q_THK = torch.empty((num_tokens, num_heads, head_dim), dtype=q_TX.dtype, device=q_TX.device)
    attention_heads_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        *rows,
        weights.q_norm_weight_K.contiguous(),
        weights.k_norm_weight_K.contiguous(),
        *(x.float().contiguous() for x in rope),
        cache.write_index_T,
        q_THK,
        *pages,
        *(x.stride(0) for x in rows),
        num_heads,
        num_kv_heads,
        head_dim,
        rope.cos.shape[1],
        page_size,
        cache.k_pages.shape[0],
        weights.eps,
        ZERO_CENTERED=weights.zero_centered,
        HAS_GATE=weights.has_gate,
        HAS_SCALES=cache.k_scales is not None,
        BLOCK_K=_block(head_dim),
        num_warps=1,
    )
    return q_THK


def _block(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _parts(
    q_THK: Tensor, pages: tuple[Tensor, ...], cache: AttentionCache, packing: Packing, scale: float
) -> tuple[Tensor, Tensor]:
    """Of each part of the context the weighted sums [T, H, splits, K], and their largest score and sum of weights."""
    from qnext.ops.triton.kernels.attention import paged_attention_kernel

    num_tokens, num_heads, head_dim = q_THK.shape
    num_kv_heads, page_size = cache.k_pages.shape[1:3]
    tiles = _tiles(q_THK, packing, cache, num_kv_heads)
    shape = (num_tokens, num_heads, tiles.num_splits)
    sums = torch.empty((*shape, head_dim), dtype=torch.float32, device=q_THK.device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=q_THK.device)
    tables_NM = cache.block_tables_NM.contiguous()
    group = num_heads // num_kv_heads
    paged_attention_kernel[(tiles.num_tiles, num_kv_heads, tiles.num_splits)](
        q_THK,
        *pages,
        tables_NM,
        cache.context_lengths_N.to(q_THK.device, non_blocking=True),
        packing.cu_seqlens,
        sums,
        stats,
        tables_NM.stride(0),
        packing.num_sequences,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        cache.k_pages.shape[0],
        tables_NM.shape[1],
        scale,
        GROUP=group,
        HAS_SCALES=cache.k_scales is not None,
        IS_WIDE=_is_wide(q_THK, cache),
        NUM_SPLITS=tiles.num_splits,
        TOKENS=tiles.tokens,
        BLOCK_M=max(16, next_power_of_2(tiles.tokens * group)),
        BLOCK_S=tiles.block_keys,
        BLOCK_K=_block(head_dim),
        BLOCK_N=next_power_of_2(packing.num_sequences),
        num_warps=8,
        num_stages=2,
    )
    return sums, stats


def _tiles(q_THK: Tensor, packing: Packing, cache: AttentionCache, num_kv_heads: int) -> _Tiles:
    """Tokens of a sequence share the keys that they read; the context is cut until every processor has two programs."""
    group = q_THK.shape[1] // num_kv_heads
    most_rows = _MAX_WIDE_ROWS if _is_wide(q_THK, cache) else _MAX_ROWS
    tokens = min(next_power_of_2(packing.max_length), max(1, most_rows // next_power_of_2(group)))
    num_tiles = packing.num_sequences + (len(q_THK) - packing.num_sequences) // tokens
    block_keys = 32 if _is_wide(q_THK, cache) else 64
    most = max(1, cache.block_tables_NM.shape[1] * cache.k_pages.shape[2] // block_keys)
    wanted = min(_MAX_SPLITS, most, max(1, 2 * num_processors(q_THK.device) // (num_tiles * num_kv_heads)))
    return _Tiles(tokens, num_tiles, next_power_of_2(wanted), block_keys)


def _is_wide(q_THK: Tensor, cache: AttentionCache) -> bool:
    """Whether products are in fp32: where q or the pages are; codes are exact in every dtype. The interpreter knows no
    products of bf16."""
    return torch.float32 in (q_THK.dtype, cache.k_pages.dtype) or is_interpreted()


def _scales(cache: AttentionCache) -> tuple[Tensor, Tensor]:
    """Those of int8 pages; where there are none, memory that nothing reads or writes."""
    if cache.k_scales is None or cache.v_scales is None:
        if cache.k_pages.dtype == torch.int8:
            raise ValueError("int8 pages need scales")
        return cache.k_pages, cache.v_pages
    return cache.k_scales, cache.v_scales


def try_attention_mixer(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """One token behind a context, and three of a sequence that has one before them."""
    weights = AttentionWeights(
        numbers(32, seed=0, device=device),
        numbers(32, seed=1, device=device),
        eps=1e-6,
        zero_centered=True,
        has_gate=True,
        scale=0.2,
    )
    rope = Rope(numbers(4, 8, seed=2, device=device), numbers(4, 8, seed=3, device=device))
    k_pages, v_pages = (numbers(5, 2, 4, 32, seed=seed, device=device) for seed in (4, 5))
    tables_NM = torch.tensor([[3, 0, 4], [2, 3, 3]], device=device)
    cache = AttentionCache(
        k_pages, v_pages, None, None, tables_NM, torch.tensor([10, 4]), torch.tensor([17, 9, 10, 11], device=device)
    )
    theirs = cache._replace(k_pages=k_pages.clone(), v_pages=v_pages.clone())
    q_TX, k_TY, v_TY = (numbers(4, width, seed=6 + width, device=device) for width in (256, 64, 65))
    packing = Packing([1, 3], device=device)
    v_TY = v_TY[:, 1:]
    wanted = reference.attention_mixer(q_TX, k_TY, v_TY, weights, rope=rope, packing=packing, cache=theirs)
    yield attention_mixer(q_TX, k_TY, v_TY, weights, rope=rope, packing=packing, cache=cache), wanted
    yield from ((k_pages, theirs.k_pages), (v_pages, theirs.v_pages))
