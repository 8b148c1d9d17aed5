"""Native attention mixer: what must hold before an address is taken.

Legend: T tokens, N sequences, M pages of a sequence, H query heads, G KV heads, K head dim, P tokens in a page,
X = H * K (2 * H * K with gates), Y = G * K, R rotated dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.ops.backend import native_module, wide
from qnext.ops.packing import Packing
from qnext.ops.reference.attention_mixer import AttentionCache

_PAGE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_HEAD_DIM_STEP = 32


def serves(head_dim: int, cache: AttentionCache | None) -> bool:
    """Whether the kernels know this head size and these pages."""
    return head_dim % _HEAD_DIM_STEP == 0 and (cache is None or cache.k_pages.dtype in _PAGE_KINDS)


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
    """The reference's mixer for fp32 activations on the CPU. Without a cache keys and values stay fp32.

    Raises ValueError for shapes, types or lengths that do not fit, IndexError for pages or places outside the pool;
    nothing is written then.
    """
    head_dim, num_tokens = q_norm_weight_K.shape[0], q_TX.shape[0]
    if cache is None:
        cache = _make_cache(packing, k_TY, head_dim)
    num_kv_heads = k_TY.shape[1] // head_dim
    num_heads = q_TX.shape[1] // (head_dim * (2 if has_gate else 1))
    half = cos.shape[1]
    sizes = (num_tokens, num_kv_heads * head_dim)
    _check(k_TY.shape == sizes and v_TY.shape == sizes, "keys and values", sizes)
    width = num_heads * head_dim * (2 if has_gate else 1)
    _check(num_heads > 0 and num_heads % num_kv_heads == 0 and q_TX.shape[1] == width, "queries", (num_tokens, width))
    _check(cos.shape == (num_tokens, half) == sin.shape and 2 * half <= head_dim, "cos and sin", (num_tokens, half))
    _check(k_norm_weight_K.shape == q_norm_weight_K.shape, "norm weights", (head_dim,))
    if not scale > 0.0:
        raise ValueError(f"scale must be positive, not {scale}")
    q_norm_weight_K, k_norm_weight_K = _ready(wide(q_norm_weight_K)), _ready(wide(k_norm_weight_K))
    q_TX, k_TY, v_TY, cos, sin = _ready(q_TX), _ready(k_TY), _ready(v_TY), _ready(cos), _ready(sin)
    k_scales, v_scales = _check_cache(cache, packing, num_tokens, num_kv_heads, head_dim)
    tables_NM = cache.block_tables_NM
    if not tables_NM.is_contiguous():
        tables_NM = tables_NM.contiguous()
    out = torch.empty(num_tokens, num_heads * head_dim)
    module = native_module()
    assert module is not None
    module.attention_mixer(
        q_TX.data_ptr(), k_TY.data_ptr(), v_TY.data_ptr(), out.data_ptr(), num_tokens, num_heads, num_kv_heads,
        head_dim, 2 * half, has_gate, q_norm_weight_K.data_ptr(), k_norm_weight_K.data_ptr(), eps, zero_centered,
        cos.data_ptr(), sin.data_ptr(), scale, _PAGE_KINDS[cache.k_pages.dtype], cache.k_pages.data_ptr(),
        cache.v_pages.data_ptr(), k_scales, v_scales, cache.k_pages.shape[0], cache.k_pages.shape[2],
        packing.num_sequences, packing.cu_seqlens.data_ptr(), cache.context_lengths_N.data_ptr(), tables_NM.data_ptr(),
        tables_NM.shape[1], cache.write_index_T.data_ptr(),
    )  # fmt: skip
    return out


def _make_cache(packing: Packing, k_TY: Tensor, head_dim: int) -> AttentionCache:
    """A page per token: keys and values of the call itself."""
    num_tokens = k_TY.shape[0]
    k_pages, v_pages = torch.empty(2, num_tokens, k_TY.shape[1] // head_dim, 1, head_dim).unbind(0)
    tables_NM = packing.cu_seqlens[:-1, None] + torch.arange(packing.max_length)
    return AttentionCache(
        k_pages, v_pages, None, None, tables_NM, packing.lengths_N, torch.arange(num_tokens)
    )  # fmt: skip


def _check_cache(
    cache: AttentionCache, packing: Packing, num_tokens: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int]:
    """Addresses of the scales, zero where there are none."""
    pages, tables_NM = cache.k_pages, cache.block_tables_NM
    shape = (pages.shape[0], num_kv_heads, pages.shape[2], head_dim)
    _check(pages.shape == shape == cache.v_pages.shape, "pages", shape)
    _check_memory(pages, pages.dtype)
    _check_memory(cache.v_pages, pages.dtype)
    _check(tables_NM.dim() == 2 and tables_NM.shape[0] == packing.num_sequences, "block tables", ("N", "M"))
    _check(cache.write_index_T.shape == (num_tokens,), "write index", (num_tokens,))
    _check(cache.context_lengths_N.shape == (packing.num_sequences,), "context lengths", (packing.num_sequences,))
    _check_memory(cache.write_index_T, torch.int64)
    _check_memory(cache.context_lengths_N, torch.int64)
    if tables_NM.dtype is not torch.int64 or not tables_NM.is_cpu:
        raise ValueError("block tables must be int64 on the CPU")
    if pages.dtype != torch.int8:
        return 0, 0
    if cache.k_scales is None or cache.v_scales is None:
        raise ValueError("int8 pages need scales")
    for scales in (cache.k_scales, cache.v_scales):
        _check(scales.shape == shape[:3], "scales", shape[:3])
        _check_memory(scales, torch.float32)
    return cache.k_scales.data_ptr(), cache.v_scales.data_ptr()


def _check(fits: bool, name: str, shape: tuple[int | str, ...]) -> None:
    if not fits:
        raise ValueError(f"{name} do not have the shape {list(shape)}")


def _ready(x: Tensor) -> Tensor:
    """fp32, contiguous; the common case costs no operation."""
    if not x.is_cpu:
        raise ValueError(f"expected a tensor on the CPU, not on {x.device}")
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _check_memory(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
        raise ValueError(f"expected {dtype}, contiguous, on the CPU, not {x.dtype} on {x.device}")
