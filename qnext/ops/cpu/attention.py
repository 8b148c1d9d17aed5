"""Native attention mixer: what must hold before an address is taken.

Legend: T tokens, N sequences, M pages of a sequence, H query heads, G KV heads, K head dim, P tokens in a page,
X = H * K (2 * H * K with gates), Y = G * K, R rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.caches import AttentionCache
from qnext.ops.checks import check_attention
from qnext.ops.cpu.kernels import check_memory, is_fp32, kernels, run_on, take, wants_gradients, widened
from qnext.ops.cpu.train_attention import trained_attention_mixer
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, Rope

_PAGE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_HEAD_DIM_STEP = 32


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
    """Whether the kernels know the head sizes and the pages."""
    tensors = (q_TX, k_TY, v_TY, weights.q_norm_weight_K, weights.k_norm_weight_K)
    if wants_gradients(*tensors):
        # One thread walks a sequence and KV head; torch divides the queries of a long sequence too.
        num_tasks = packing.num_sequences * (k_TY.shape[1] // weights.head_dim)
        has_work_for_all = num_tasks >= torch.get_num_threads()
        is_plain = cache is None and all(map(is_fp32, (*tensors, *rope)))
        return is_plain and has_work_for_all and run_on(q_TX.device) and fits_attention_mixer(weights)
    return take(q_TX) and fits_attention_mixer(weights) and (cache is None or fits_pages(cache.k_pages.dtype))


def fits_attention_mixer(weights: AttentionWeights) -> bool:
    """Whether the kernel takes heads of that size."""
    return weights.head_dim % _HEAD_DIM_STEP == 0


def fits_pages(dtype: torch.dtype) -> bool:
    """Whether the kernel reads and writes pages of that type."""
    return dtype in _PAGE_KINDS


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
    """See ops.attention_mixer. Without a cache keys and values stay fp32. With gradients it serves calls without one.

    Raises ValueError for shapes, types or lengths that do not fit, IndexError for pages or places outside the pool;
    nothing is written then.
    """
    check_attention(q_TX, k_TY, v_TY, weights, rope, packing)
    if wants_gradients(q_TX, k_TY, v_TY, weights.q_norm_weight_K, weights.k_norm_weight_K):
        return trained_attention_mixer(q_TX, k_TY, v_TY, weights, rope=rope, packing=packing)
    num_tokens, head_dim = q_TX.shape[0], weights.head_dim
    if cache is None:
        cache = _make_cache(packing, k_TY, head_dim)
    num_kv_heads = k_TY.shape[1] // head_dim
    num_heads = q_TX.shape[1] // (head_dim * (2 if weights.has_gate else 1))
    pages = _checked_pages(cache, num_kv_heads, head_dim)
    tables_NM = cache.block_tables_NM.contiguous()
    sequences = _checked_sequences(cache, packing, num_tokens, tables_NM)
    q_TX, k_TY, v_TY, cos, sin = _ready(q_TX), _ready(k_TY), _ready(v_TY), _ready(rope.cos), _ready(rope.sin)
    q_norm_K, k_norm_K = _ready(widened(weights.q_norm_weight_K)), _ready(widened(weights.k_norm_weight_K))
    out = torch.empty(num_tokens, num_heads * head_dim)
    native = kernels()
    native.attention_mixer(
        native.AttentionRows(
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            has_gate=weights.has_gate,
            q=q_TX.data_ptr(),
            k=k_TY.data_ptr(),
            v=v_TY.data_ptr(),
            out=out.data_ptr(),
        ),
        native.AttentionNorms(
            q_weight=q_norm_K.data_ptr(),
            k_weight=k_norm_K.data_ptr(),
            eps=weights.eps,
            zero_centered=weights.zero_centered,
            scale=weights.scale,
        ),
        native.AttentionRope(rotary_dim=2 * cos.shape[1], cos=cos.data_ptr(), sin=sin.data_ptr()),
        pages,
        sequences,
    )
    return out


def _make_cache(packing: Packing, k_TY: Tensor, head_dim: int) -> AttentionCache:
    """A page per token: keys and values of the call itself."""
    num_tokens = k_TY.shape[0]
    k_pages, v_pages = torch.empty(2, num_tokens, k_TY.shape[1] // head_dim, 1, head_dim).unbind(0)
    tables_NM = packing.cu_seqlens[:-1, None] + torch.arange(packing.max_length)
    return AttentionCache(k_pages, v_pages, None, None, tables_NM, packing.lengths_N, torch.arange(num_tokens))


def _checked_pages(cache: AttentionCache, num_kv_heads: int, head_dim: int) -> Any:
    pages = cache.k_pages
    shape = (pages.shape[0], num_kv_heads, pages.shape[2], head_dim)
    check_memory(pages, pages.dtype, shape)
    check_memory(cache.v_pages, pages.dtype, shape)
    k_scales = v_scales = 0
    if pages.dtype == torch.int8:
        if cache.k_scales is None or cache.v_scales is None:
            raise ValueError("int8 pages need scales")
        for scales in (cache.k_scales, cache.v_scales):
            check_memory(scales, torch.float32, shape[:3])
        k_scales, v_scales = cache.k_scales.data_ptr(), cache.v_scales.data_ptr()
    return kernels().AttentionPages(
        kind=_PAGE_KINDS[pages.dtype],
        k=pages.data_ptr(),
        v=cache.v_pages.data_ptr(),
        k_scales=k_scales,
        v_scales=v_scales,
        num_pages=pages.shape[0],
        page_size=pages.shape[2],
    )


def _checked_sequences(cache: AttentionCache, packing: Packing, num_tokens: int, tables_NM: Tensor) -> Any:
    num_sequences = packing.num_sequences
    if tables_NM.dim() != 2:
        raise ValueError(f"block tables must be a matrix, not of shape {list(tables_NM.shape)}")
    check_memory(tables_NM, torch.int64, (num_sequences, tables_NM.shape[1]))
    check_memory(cache.write_index_T, torch.int64, (num_tokens,))
    check_memory(cache.context_lengths_N, torch.int64, (num_sequences,))
    return kernels().AttentionSequences(
        num_sequences=num_sequences,
        starts=packing.cu_seqlens.data_ptr(),
        contexts=cache.context_lengths_N.data_ptr(),
        tables=tables_NM.data_ptr(),
        table_stride=tables_NM.shape[1],
        write_index=cache.write_index_T.data_ptr(),
    )


def _ready(x: Tensor) -> Tensor:
    """fp32, contiguous; the common case costs no operation."""
    if not x.is_cpu:
        raise ValueError(f"expected a tensor on the CPU, not on {x.device}")
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
