"""Attention over pages by GPU kernels is the reference's: decode, drafts, chunks of a prompt, all kinds of pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import AttentionCache, AttentionWeights, Packing, Rope, reference
from qnext.ops import triton as gpu

from ..compare import assert_close, randn
from .device import DEVICE, TOLERANCE, TOLERANCE_BF16, exact, here

NUM_PAGES, PAGE_SIZE = 40, 5
NAN = float("nan")


def make_call(
    lengths: list[int], contexts: list[int], *, heads: int = 6, kv_heads: int = 2, dim: int = 24, dtype: torch.dtype
) -> dict[str, Any]:
    """Rows of a call, behind which sequences have so many tokens, and pages with NaN in every place that none owns."""
    num_tokens, half = sum(lengths), 3
    weights = AttentionWeights(
        randn(dim, seed=0, scale=0.3, dtype=dtype), randn(dim, seed=1, scale=0.3, dtype=dtype), 1e-6, True, True, 0.3
    )
    rope = Rope(*(randn(num_tokens, half, seed=seed, dtype=torch.float32) for seed in (2, 3)))
    pages = [randn(NUM_PAGES, kv_heads, PAGE_SIZE, dim, seed=seed, dtype=torch.float32) for seed in (4, 5)]
    order = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(6))
    width = -(-max(contexts) // PAGE_SIZE) + 1
    tables = order[: width * len(lengths)].view(len(lengths), width)
    owned = torch.zeros(NUM_PAGES, PAGE_SIZE, dtype=torch.bool)
    places = []
    for table, length, context in zip(tables, lengths, contexts, strict=True):
        positions = torch.arange(context)
        owned[table[positions // PAGE_SIZE], positions % PAGE_SIZE] = True
        new = positions[context - length :]
        places.append(table[new // PAGE_SIZE] * PAGE_SIZE + new % PAGE_SIZE)
        owned[table[new // PAGE_SIZE], new % PAGE_SIZE] = False
    for page in pages:
        page.masked_fill_(~owned[:, None, :, None], NAN)
    cache = AttentionCache(*pages, None, None, tables, torch.tensor(contexts), torch.cat(places))
    rows = [randn(num_tokens, n * dim, seed=7 + i, dtype=dtype) for i, n in enumerate((2 * heads, kv_heads, kv_heads))]
    return {"rows": rows, "weights": weights, "rope": rope, "cache": cache, "lengths": lengths}


def run(call: dict[str, Any], op: Any, device: torch.device) -> tuple[Tensor, AttentionCache]:
    cache = call["cache"]
    cache = cache._replace(context_lengths_N=cache.context_lengths_N.cpu())
    packing = Packing(call["lengths"], device=device)
    out = op(*call["rows"], call["weights"], rope=call["rope"], packing=packing, cache=cache)
    return out, cache


def assert_is_reference(call: dict[str, Any], *, tolerance: float) -> tuple[AttentionCache, AttentionCache]:
    wanted, theirs = run(exact(call), reference.attention_mixer, torch.device("cpu"))
    ours = here(call)
    arguments = {"rope": ours["rope"], "packing": Packing(call["lengths"], device=DEVICE), "cache": ours["cache"]}
    assert gpu.serves_attention_mixer(*ours["rows"], ours["weights"], **arguments)
    actual, cache = run(ours, ops.attention_mixer, DEVICE)
    assert actual.dtype == call["rows"][0].dtype
    assert_close(actual.cpu(), wanted, tolerance=tolerance)
    return cache, theirs


@pytest.mark.parametrize(
    "lengths, contexts",
    [([1], [1]), ([1, 1, 1], [9, 1, 40]), ([4, 1, 3], [30, 33, 3]), ([2, 37], [2, 45])],
    ids=str,
)
def test_steps_and_chunks_in_fp32(lengths: list[int], contexts: list[int]) -> None:
    call = make_call(lengths, contexts, dtype=torch.float32)
    ours, theirs = assert_is_reference(call, tolerance=TOLERANCE)
    for name in ("k_pages", "v_pages"):
        assert_close(getattr(ours, name).cpu().nan_to_num(7.0), getattr(theirs, name).nan_to_num(7.0), tolerance=1e-6)


@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 8), (8, 1, 40), (3, 3, 64), (2, 1, 256)])
def test_sizes_of_heads(heads: int, kv_heads: int, dim: int) -> None:
    call = make_call([1, 3], [11, 7], heads=heads, kv_heads=kv_heads, dim=dim, dtype=torch.float32)
    assert_is_reference(call, tolerance=TOLERANCE)


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16])
def test_rows_in_bf16(page_dtype: torch.dtype) -> None:
    call = make_call([1, 3], [23, 12], dtype=torch.bfloat16)
    cache = call["cache"]
    call["cache"] = cache._replace(k_pages=cache.k_pages.to(page_dtype), v_pages=cache.v_pages.to(page_dtype))
    assert_is_reference(call, tolerance=TOLERANCE_BF16 * 2)


def test_pages_of_codes() -> None:
    """The codes and scales of the reference, and what it makes of them."""
    call = make_call([1, 3], [23, 12], dtype=torch.float32)
    cache = call["cache"]
    codes = [(x.nan_to_num(0.0) * 40).round().clamp(-127, 127).to(torch.int8) for x in cache[:2]]
    scales = [randn(*x.shape[:3], seed=9, dtype=torch.float32).abs() / 50 for x in cache[:2]]
    scales = [scale.masked_fill(x.isnan().any(-1), NAN) for scale, x in zip(scales, cache[:2], strict=True)]
    call["cache"] = cache._replace(k_pages=codes[0], v_pages=codes[1], k_scales=scales[0], v_scales=scales[1])
    ours, theirs = assert_is_reference(call, tolerance=TOLERANCE)
    assert torch.equal(ours.k_pages.cpu(), theirs.k_pages) and torch.equal(ours.v_pages.cpu(), theirs.v_pages)
    for name in ("k_scales", "v_scales"):
        assert_close(getattr(ours, name).cpu().nan_to_num(7.0), getattr(theirs, name).nan_to_num(7.0), tolerance=1e-6)
    with pytest.raises(ValueError, match="int8 pages need scales"):
        run(here(call | {"cache": call["cache"]._replace(k_scales=None)}), ops.attention_mixer, DEVICE)


def test_a_launch_serves_other_lengths_of_the_same_sum() -> None:
    """As a recorded one does: what is launched depends on the number of sequences and tokens alone."""
    first, other = (make_call(lengths, [12, 20], dtype=torch.float32) for lengths in ([4, 1], [1, 4]))
    wanted, _ = run(exact(other), reference.attention_mixer, torch.device("cpu"))
    packing = Packing(first["lengths"], device=DEVICE)
    packing.cu_seqlens.copy_(torch.tensor([0, 1, 5]))
    ours = here(other)
    cache = ours["cache"]._replace(context_lengths_N=other["cache"].context_lengths_N)
    actual = gpu.attention_mixer(*ours["rows"], ours["weights"], rope=ours["rope"], packing=packing, cache=cache)
    assert_close(actual.cpu(), wanted, tolerance=TOLERANCE)


def test_without_pages_torch_computes() -> None:
    call = here(make_call([2], [2], dtype=torch.float32))
    arguments = {"rope": call["rope"], "packing": Packing([2], device=DEVICE), "cache": None}
    assert not gpu.serves_attention_mixer(*call["rows"], call["weights"], **arguments)
