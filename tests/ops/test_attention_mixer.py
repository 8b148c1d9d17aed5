"""The attention mixer of every backend against the formula, and the identities that hold bit for bit.

Legend: T tokens, N sequences, M pages of a sequence, H query heads, G KV heads, K head dim, P tokens in a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import AttentionCache, AttentionWeights, Packing, Rope
from qnext.ops.backends import cpu_kernels
from qnext.ops.reference import attention_mixer as reference
from qnext.ops.torch import attention_mixer as torch_mixer
from tests.ops.compare import LENGTHS, RAGGED, assert_close, assert_same_function, randn

PAGE = 16
NUM_ISAS = 1 + native.best_isa() if (native := cpu_kernels()) is not None else 0
needs_native = pytest.mark.skipif(native is None, reason="needs the native kernels")
# Relative RMS for fp32 pages: sums over up to thousands of keys in another order. For narrow pages the CPU may round
# queries and weights to bf16: two roundings of 2^-9 each, halved on average; codes of int8 may differ where a number
# lies between two of them.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.int8: 5e-3}
PAGE_DTYPES = list(TOLERANCES)


class Sizes(NamedTuple):
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 24
    has_gate: bool = True


SIZES = Sizes()
Pages = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # keys, values, and scales of codes


@pytest.fixture(params=range(NUM_ISAS))
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    assert native is not None
    native.force_isa(request.param)
    yield request.param
    native.force_isa(native.best_isa())


class Sequences:
    """Inputs of whole sequences and pages for them, shuffled in a pool that holds NaN wherever nothing was written."""

    def __init__(self, contexts: list[int], dtype: torch.dtype = torch.float32, sizes: Sizes = SIZES) -> None:
        self.contexts, self.dtype, self.sizes = contexts, dtype, sizes
        num_tokens, (_, kv_heads, dim, rotary_dim, has_gate) = sum(contexts), sizes
        self.q = randn(num_tokens, sizes.heads * dim * (2 if has_gate else 1), seed=0, dtype=torch.float32)
        self.k = randn(num_tokens, kv_heads * dim, seed=1, dtype=torch.float32)
        self.v = randn(num_tokens, kv_heads * dim, seed=2, dtype=torch.float32)
        positions = torch.cat([torch.arange(context) for context in contexts])
        self.rope = ops.rope_cos_sin(positions, ops.rope_frequencies(rotary_dim, theta=1e4))
        self.norms = [randn(dim, seed=seed, dtype=torch.float32, scale=0.2) for seed in (3, 4)]
        counts = [-(-context // PAGE) for context in contexts]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(5))
        # Behind its own pages a table may name any page: here one that nobody wrote.
        padded = [torch.cat([t, order[-1:].expand(max(counts) + 1 - len(t))]) for t in order[:-3].split(counts)]
        self.tables_NM = torch.stack(padded)
        shape = (len(order), kv_heads, PAGE, dim)
        self.pages: Pages
        if dtype == torch.int8:
            codes, scales = torch.full(shape, 111, dtype=dtype), torch.full(shape[:-1], float("nan"))
            self.pages = codes, codes.clone(), scales, scales.clone()
        else:
            self.pages = (
                torch.full(shape, float("nan"), dtype=dtype),
                torch.full(shape, float("nan"), dtype=dtype),
                None,
                None,
            )

    def run(self, mixer: Any, spans: list[tuple[int, int, int]]) -> Tensor:
        """One call for tokens [start, end) of sequences n; (n, start, end) each."""
        firsts = [sum(self.contexts[:n]) for n, _, _ in spans]
        rows_T = torch.cat(
            [torch.arange(start, end) + first for (_, start, end), first in zip(spans, firsts, strict=True)]
        )
        places = []
        for n, start, end in spans:
            positions = torch.arange(start, end)
            places.append(self.tables_NM[n][positions // PAGE] * PAGE + positions % PAGE)
        cache = AttentionCache(
            *self.pages,
            self.tables_NM[[n for n, _, _ in spans]],
            torch.tensor([end for _, _, end in spans]),
            torch.cat(places),
        )
        return self.call(mixer, rows_T, [end - start for _, start, end in spans], cache)

    def call(self, mixer: Any, rows_T: Tensor, lengths: list[int], cache: AttentionCache | None) -> Tensor:
        scale, has_gate = self.sizes.head_dim**-0.5, self.sizes.has_gate
        weights = AttentionWeights(*self.norms, eps=1e-6, zero_centered=True, has_gate=has_gate, scale=scale)
        rope = Rope(*(x[rows_T] for x in self.rope))
        rows = (x[rows_T] for x in (self.q, self.k, self.v))
        return mixer(*rows, weights, rope=rope, packing=Packing(lengths), cache=cache)

    def whole(self, mixer: Any) -> Tensor:
        return self.run(mixer, [(n, 0, context) for n, context in enumerate(self.contexts)])


def copy_of(pages: Pages) -> Pages:
    k, v, *scales = (None if x is None else x.clone() for x in pages)
    assert k is not None and v is not None
    return k, v, scales[0], scales[1]


class Expected(NamedTuple):
    """What the reference makes of tokens behind some cuts: pages before and after, and rows."""

    before: Pages
    rows: Tensor
    after: Pages


@cache
def expected_behind(contexts: tuple[int, ...], cuts: tuple[int, ...], dtype: torch.dtype, sizes: Sizes) -> Expected:
    """Computed once for all backends and instruction sets. Nobody writes into it."""
    sequences = Sequences(list(contexts), dtype, sizes)
    before = [(n, 0, cut) for n, cut in enumerate(cuts) if cut]
    if before:
        sequences.run(reference, before)
    pages = copy_of(sequences.pages)
    rows = sequences.run(reference, [(n, cut, contexts[n]) for n, cut in enumerate(cuts)])
    return Expected(pages, rows, sequences.pages)


def assert_agrees(
    contexts: list[int], cuts: list[int], dtype: torch.dtype, sizes: Sizes = SIZES, *, mixer: Any = ops.attention_mixer
) -> None:
    """Tokens before the cuts are written first, the rest is compared with the reference over the same pages."""
    expected, actual = expected_behind(tuple(contexts), tuple(cuts), dtype, sizes), Sequences(contexts, dtype, sizes)
    actual.pages = copy_of(expected.before)
    rows = actual.run(mixer, [(n, cut, contexts[n]) for n, cut in enumerate(cuts)])
    assert_close(rows, expected.rows, tolerance=TOLERANCES[dtype])
    for ours, theirs in zip(actual.pages, expected.after, strict=True):
        if ours is not None and theirs is not None:
            assert torch.equal(ours.isnan(), theirs.isnan())
            # the last bit of a rounded key, a code at a tie
            step = 1.0 if dtype == torch.int8 and ours.dtype == dtype else 2**-7 * theirs.nan_to_num().abs().max()
            assert (ours.float() - theirs.float()).nan_to_num().abs().max() <= step


MIXERS = {"torch": torch_mixer} | ({} if native is None else {"cpu": ops.attention_mixer})


@pytest.mark.parametrize("backend", MIXERS)
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, dtype: torch.dtype, backend: str) -> None:
    assert_agrees([length], [0], dtype, mixer=MIXERS[backend])


@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize(
    ("contexts", "cuts"), [([64, 1, 17, 200], [63, 0, 16, 199]), ([40, 133, 64, 17], [33, 101, 63, 0]), ([15], [13])]
)
@pytest.mark.parametrize("sizes", [SIZES, Sizes(3, 3, 10, 6, has_gate=False)])
def test_contexts_on_torch(contexts: list[int], cuts: list[int], dtype: torch.dtype, sizes: Sizes) -> None:
    assert_agrees(contexts, cuts, dtype, sizes, mixer=torch_mixer)


def assert_same_gradients(
    mixer: Any,
    definition: Any,
    lengths: list[int],
    sizes: Sizes,
    *,
    dtype: torch.dtype,
    zero_centered: bool = True,
    tolerance: float,
) -> None:
    sequences = Sequences(lengths, sizes=sizes)

    def run(mixer: Any, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor) -> tuple[Tensor]:
        gate = {"has_gate": sizes.has_gate, "zero_centered": zero_centered}
        weights = AttentionWeights(q_norm, k_norm, eps=1e-6, scale=0.3, **gate)
        rope = Rope(*(x.to(q.dtype) for x in sequences.rope))
        return (mixer(q, k, v, weights, rope=rope, packing=Packing(lengths)),)

    numbers = (sequences.q, sequences.k, sequences.v, *sequences.norms)
    assert_same_function(
        lambda **x: run(mixer, **x),
        lambda **x: run(definition, **x),
        {name: x.to(dtype) for name, x in zip(("q", "k", "v", "q_norm", "k_norm"), numbers, strict=True)},
        tolerance=tolerance,
    )


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("lengths", [[1], [65], RAGGED], ids=str)
def test_torch_has_the_gradients_of_the_reference(lengths: list[int], has_gate: bool) -> None:
    sizes = Sizes(6, 2, 10, 4, has_gate)
    assert_same_gradients(torch_mixer, reference, lengths, sizes, dtype=torch.float64, tolerance=1e-12)


@needs_native
@pytest.mark.parametrize("lengths", [*([length] for length in LENGTHS[1:]), RAGGED], ids=str)
def test_native_has_the_gradients_of_the_reference(lengths: list[int], isa: int) -> None:
    """Against torch in fp64, the reference (see above). A token alone, whose q and k have none, is in RAGGED."""
    tolerance = 4 * TOLERANCES[torch.float32]  # twice as many sums on the way back, and norms
    assert_same_gradients(ops.attention_mixer, torch_mixer, lengths, SIZES, dtype=torch.float32, tolerance=tolerance)


@needs_native
@pytest.mark.parametrize(
    "sizes", [Sizes(3, 3, 32, 32, False), Sizes(8, 1, 96, 96), Sizes(2, 1, 256, 64), Sizes(4, 2, 64, 0)], ids=str
)
def test_native_gradients_of_any_sizes(sizes: Sizes, isa: int) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "tolerance": 4 * TOLERANCES[torch.float32]}
    assert_same_gradients(ops.attention_mixer, reference, [3, 70], sizes, zero_centered=False, **options)


@needs_native
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize(
    ("contexts", "cuts"),
    [
        ([64, 1, 17, 200], [63, 0, 16, 199]),  # decode
        ([40, 133, 64, 17], [33, 101, 63, 0]),  # suffixes, a decode among them
        ([1030], [1029]),  # two chunks of keys
        ([2100, 40], [2040, 39]),
    ],
)
def test_contexts(isa: int, contexts: list[int], cuts: list[int], dtype: torch.dtype) -> None:
    assert_agrees(contexts, cuts, dtype)


@needs_native
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads=16, kv_heads=2, head_dim=256, rotary_dim=64),
        Sizes(heads=3, kv_heads=3, head_dim=128, rotary_dim=128, has_gate=False),
        Sizes(heads=5, kv_heads=1, head_dim=32, rotary_dim=10),
        Sizes(heads=34, kv_heads=1, head_dim=96, rotary_dim=32),
    ],
)
def test_sizes(isa: int, sizes: Sizes, dtype: torch.dtype) -> None:
    assert_agrees([130, 7], [60, 6], dtype, sizes)


@needs_native
def test_many_heads_of_one_group() -> None:
    assert_agrees([70], [65], torch.bfloat16, Sizes(heads=140, kv_heads=1, head_dim=32, rotary_dim=32))


@needs_native
@pytest.mark.parametrize("lengths", [[1], [130], [1, 64, 3, 65]])
def test_without_cache(isa: int, lengths: list[int]) -> None:
    sequences = Sequences(lengths)
    rows_T = torch.arange(sum(lengths))
    wanted = sequences.call(reference, rows_T, lengths, None)
    actual = sequences.call(ops.attention_mixer, rows_T, lengths, None)
    assert_close(actual, wanted, tolerance=TOLERANCES[torch.float32])
    assert torch.equal(actual, sequences.whole(ops.attention_mixer))


@needs_native
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
def test_any_cut_gives_the_same_bits(isa: int, dtype: torch.dtype) -> None:
    context = 150
    whole = Sequences([context], dtype).whole(ops.attention_mixer)
    for chunk in (1, 7, 64, 149):
        sequences = Sequences([context], dtype)
        cuts = [*range(0, context, chunk), context]
        pieces = [sequences.run(ops.attention_mixer, [(0, a, b)]) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole), chunk


@needs_native
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
def test_long_contexts_have_the_same_bits_cut_batched_and_on_any_threads(dtype: torch.dtype) -> None:
    assert native is not None
    contexts = [2200, 1100, 90]
    cuts = [2199, 1040, 0]
    whole = Sequences(contexts, dtype).whole(ops.attention_mixer).split(contexts)
    expected = [rows[cut:] for rows, cut in zip(whole, cuts, strict=True)]
    num_threads = native.num_threads()
    try:
        for threads in (1, 2, 3):
            native.set_num_threads(threads)
            sequences = Sequences(contexts, dtype)
            sequences.run(ops.attention_mixer, [(0, 0, cuts[0]), (1, 0, cuts[1])])
            spans = [(n, cut, context) for n, (cut, context) in enumerate(zip(cuts, contexts, strict=True))]
            together = sequences.run(ops.attention_mixer, spans)
            assert torch.equal(together, torch.cat(expected))
            for span, rows in zip(spans, expected, strict=True):
                assert torch.equal(sequences.run(ops.attention_mixer, [span]), rows)
    finally:
        native.set_num_threads(num_threads)


@needs_native
@pytest.mark.parametrize("dtype", PAGE_DTYPES)
def test_extreme_scores(dtype: torch.dtype) -> None:
    """Weights of exactly one and zero: the largest score wins by thousands."""
    sequences = [Sequences([300], dtype) for _ in range(2)]
    for s in sequences:
        s.norms = [200.0 * (1.0 + norm.abs()) for norm in s.norms]
    actual, wanted = sequences[0].whole(ops.attention_mixer), sequences[1].whole(reference)
    assert actual.isfinite().all()
    # Near ties of scores in the ten thousands change by more than one when a factor is rounded.
    assert_close(actual, wanted, tolerance=1e-3 if dtype == torch.float32 else 0.3)


def make_call() -> tuple[Sequences, AttentionCache]:
    sequences = Sequences([20])
    places = sequences.tables_NM[0][torch.arange(20) // PAGE] * PAGE + torch.arange(20) % PAGE
    return sequences, AttentionCache(*sequences.pages, sequences.tables_NM, torch.tensor([20]), places)


@needs_native
@pytest.mark.parametrize("bad", [-1, 10**9, 2**62])
@pytest.mark.parametrize("field", ["table", "index"])
def test_places_outside_of_the_pages_are_refused(field: str, bad: int) -> None:
    sequences, cache = make_call()
    (cache.block_tables_NM[0] if field == "table" else cache.write_index_T)[1] = bad
    with pytest.raises(IndexError):
        sequences.call(ops.attention_mixer, torch.arange(20), [20], cache)
    assert cache.k_pages.isnan().all()


@needs_native
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"context_lengths_N": torch.tensor([19])}, ValueError),
        ({"context_lengths_N": torch.tensor([20, 20])}, ValueError),
        ({"context_lengths_N": torch.tensor([10**6])}, IndexError),
        ({"write_index_T": torch.zeros(19, dtype=torch.long)}, ValueError),
        ({"write_index_T": torch.zeros(20, dtype=torch.int32)}, ValueError),
        ({"block_tables_NM": torch.zeros(2, 2, dtype=torch.long)}, ValueError),
        ({"v_pages": torch.zeros(5, 2, PAGE, 32)}, ValueError),
        ({"k_pages": torch.zeros(5, 2, PAGE, 64, dtype=torch.int8)}, ValueError),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    sequences, cache = make_call()
    with pytest.raises(error):
        sequences.call(ops.attention_mixer, torch.arange(20), [20], cache._replace(**change))


@needs_native
def test_no_gradient_crosses_a_boundary_or_depends_on_threads(isa: int) -> None:
    """A loss on the second of three sequences: the rows of the others get exact zeros."""
    assert native is not None
    results = []
    try:
        for count in (1, 3):
            native.set_num_threads(count)
            sequences = Sequences([64, 70, 5])
            rows = [x.requires_grad_() for x in (sequences.q, sequences.k, sequences.v)]
            sequences.call(ops.attention_mixer, torch.arange(139), [64, 70, 5], None)[64:134].square().sum().backward()
            results.append([x.grad for x in rows])
    finally:
        native.set_num_threads(torch.get_num_threads())
    for grad, other in zip(*results, strict=True):
        assert grad is not None and torch.equal(grad, other)
        assert not grad[:64].any() and not grad[134:].any() and grad[64:134].any(dim=1).all()


def test_int8_pages_of_the_reference_are_close_to_wide_ones() -> None:
    """A code is off by at most half a step of 1/127 of the largest number: about 1 % of the typical one."""
    contexts = [70, 17]
    wide, narrow = (Sequences(contexts, dtype).whole(reference) for dtype in (torch.float32, torch.int8))
    assert_close(narrow, wide, tolerance=2e-2)
