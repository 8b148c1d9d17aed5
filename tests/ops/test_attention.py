"""Attention against its formula, and paged attention against plain attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import Packing
from qnext.ops.reference.attention import attention as formula
from qnext.ops.torch.attention import paged_attention, write_kv

from .compare import LENGTHS, RAGGED, TOLERANCES, assert_close, assert_same_function, randn

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE = 6, 2, 10, 16
SCALE = 0.37


def definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor]:
    return (formula(q, k, v, packing=Packing(lengths), scale=SCALE),)


def make_inputs(num_tokens: int, dtype: torch.dtype = torch.float64, kv_heads: int = KV_HEADS) -> dict[str, Tensor]:
    return {
        "q": randn(num_tokens, QUERY_HEADS, HEAD_DIM, seed=0, dtype=dtype),
        "k": randn(num_tokens, kv_heads, HEAD_DIM, seed=1, dtype=dtype),
        "v": randn(num_tokens, kv_heads, HEAD_DIM, seed=2, dtype=dtype),
    }


@pytest.mark.parametrize("lengths", [[length] for length in LENGTHS] + [RAGGED, [3, 3], [1, 1]])
def test_attention(lengths: list[int]) -> None:
    assert_same_function(
        lambda q, k, v: (ops.attention(q, k, v, packing=Packing(lengths), scale=SCALE),),
        lambda q, k, v: definition(q, k, v, lengths),
        make_inputs(sum(lengths)),
        tolerance=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_narrow_attention(dtype: torch.dtype, kv_heads: int) -> None:
    assert_same_function(
        lambda q, k, v: (ops.attention(q, k, v, packing=Packing(RAGGED), scale=SCALE),),
        lambda q, k, v: definition(q, k, v, RAGGED),
        make_inputs(sum(RAGGED), dtype, kv_heads),
        tolerance=TOLERANCES[dtype],
        # bf16 gradients pass through rounded probabilities
        gradient_tolerance=3e-2 if dtype == torch.bfloat16 else 0.0,
    )


class Pages:
    """Pages of several sequences, interleaved in a shuffled pool that holds NaN wherever nothing was written."""

    def __init__(self, contexts: list[int], dtype: torch.dtype) -> None:
        counts = [-(-context // PAGE) for context in contexts]
        order = torch.randperm(sum(counts) + 5, generator=torch.Generator().manual_seed(0))
        self.k = torch.full((len(order), KV_HEADS, PAGE, HEAD_DIM), float("nan"), dtype=dtype)
        self.v = self.k.clone()
        tables = order[: sum(counts)].split(counts)
        width = max(counts) + 1
        # Behind its own pages a table may name any page: here one that nobody wrote.
        self.tables = torch.stack([torch.cat([t, order[-1:].expand(width - len(t))]) for t in tables])

    def write(self, n: int, start: int, k: Tensor, v: Tensor) -> None:
        places = torch.arange(start, start + len(k))
        index = self.tables[n][places // PAGE] * PAGE + places % PAGE
        write_kv(k, v, self.k, self.v, write_index_T=index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("contexts", "lengths"),
    [
        ([1, 16, 17, 100], [1, 1, 1, 1]),  # decode
        ([40, 17, 64, 5], [40, 17, 64, 5]),  # whole prefill
        ([40, 33, 64, 17], [7, 32, 1, 16]),  # suffixes, a decode among them
        ([15], [2]),
    ],
)
def test_paged_attention_is_attention(dtype: torch.dtype, contexts: list[int], lengths: list[int]) -> None:
    inputs = make_inputs(sum(contexts), dtype)
    pages = Pages(contexts, dtype)
    for n, (k, v) in enumerate(zip(inputs["k"].split(contexts), inputs["v"].split(contexts), strict=True)):
        cut = contexts[n] - lengths[n]
        pages.write(n, 0, k[:cut], v[:cut])
        pages.write(n, cut, k[cut:], v[cut:])
    pieces = zip(inputs["q"].split(contexts), lengths, strict=True)
    q = torch.cat([piece[len(piece) - length :] for piece, length in pieces])
    actual = paged_attention(
        q,
        pages.k,
        pages.v,
        packing=Packing(lengths),
        block_tables_NM=pages.tables,
        context_lengths=tuple(contexts),
        scale=SCALE,
    )
    whole = definition(*(inputs[name].double() for name in "qkv"), contexts)[0].split(contexts)
    expected = torch.cat([rows[len(rows) - length :] for rows, length in zip(whole, lengths, strict=True)])
    assert actual.dtype == dtype
    assert_close(actual, expected, tolerance=TOLERANCES[dtype])


def test_keys_are_kept_in_the_dtype_of_the_pages() -> None:
    pages = Pages([3], torch.bfloat16)
    k, v = randn(3, KV_HEADS, HEAD_DIM, seed=0), randn(3, KV_HEADS, HEAD_DIM, seed=1)
    pages.write(0, 0, k, v)
    page = pages.tables[0, 0]
    assert torch.equal(pages.k[page, :, :3], k.transpose(0, 1).to(torch.bfloat16))
    assert torch.equal(pages.v[page, :, :3], v.transpose(0, 1).to(torch.bfloat16))
    assert pages.k[page, :, 3:].isnan().all()
    q = randn(1, QUERY_HEADS, HEAD_DIM, seed=2, dtype=torch.float32)
    out = paged_attention(
        q, pages.k, pages.v, packing=Packing([1]), block_tables_NM=pages.tables, context_lengths=(3,), scale=SCALE
    )
    assert out.dtype == torch.float32
    assert out.isfinite().all()
