"""Positions up to 1,010,000: angles against fp64, attention over a paged cache of that length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import AttentionCache, AttentionWeights, Packing, Rope, attention_mixer, backend_of, reference

from .compare import assert_close, randn

LENGTH, PAGE, DIM, KV_HEADS = 1_010_000, 16, 32, 1
IS_CUT_INVARIANT = backend_of(torch.device("cpu")).is_cut_invariant


def released_frequencies() -> tuple[Tensor, float]:
    return ops.yarn_frequencies(
        64,
        theta=1e7,
        factor=4.0,
        original_length=262_144,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=None,
        truncate=True,
    )


@pytest.mark.parametrize("end", [1_000, 262_144, LENGTH])
@pytest.mark.parametrize("cos_sin", [ops.rope_cos_sin, reference.rope_cos_sin])
def test_angles_are_exact_at_every_position(cos_sin: object, end: int) -> None:
    """A product in fp32, as transformers has it, is off by 0.03 at a million: this would show."""
    frequencies, factor = released_frequencies()
    positions = torch.arange(end - 1_000, end)
    angles = positions[:, None].double() * frequencies.double()
    cos, sin = cos_sin(positions, frequencies, attention_factor=factor)  # type: ignore[operator]
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos - factor * angles.cos()).abs().max() < 3e-7
    assert (sin - factor * angles.sin()).abs().max() < 3e-7


def test_scores_depend_on_the_distance_only_at_a_million() -> None:
    frequencies, factor = released_frequencies()
    q, k = (randn(1, 1, 64, seed=seed, dtype=torch.float32) for seed in (0, 1))

    def score(at: int, distance: int) -> float:
        positions = (torch.tensor([at]), torch.tensor([at - distance]))
        rotated = [
            ops.apply_rope(x, ops.rope_cos_sin(p, frequencies, attention_factor=factor))
            for x, p in zip((q, k), positions, strict=True)
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(LENGTH - 1, 77) == pytest.approx(score(100, 77), rel=1e-5)


class LongCache:
    """A sequence of tokens whose last `num_new` are computed; its table names few pages again and again."""

    def __init__(self, num_new: int, *, num_heads: int, length: int = LENGTH) -> None:
        num_pages, tail = -(-length // PAGE), -(-num_new // PAGE) + 1
        pool = 40
        self.table_M = torch.arange(num_pages) % pool
        self.table_M[-tail:] = pool + torch.arange(tail)  # the pages that are written are the sequence's own
        shape = (pool + tail, KV_HEADS, PAGE, DIM)
        self.k_pages, self.v_pages = (randn(*shape, seed=seed, dtype=torch.float32) for seed in (1, 2))
        width = num_heads * DIM
        self.q, self.k, self.v = (
            randn(num_new, size, seed=seed, dtype=torch.float32)
            for seed, size in ((3, 2 * width), (4, KV_HEADS * DIM), (5, KV_HEADS * DIM))
        )
        frequencies = ops.rope_frequencies(8, theta=1e7)
        self.positions = torch.arange(length - num_new, length)
        self.rope = ops.rope_cos_sin(self.positions, frequencies)

    def run(self, mixer: object, first: int, end: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The mixer on new tokens [first, end)."""
        positions = self.positions[first:end]
        cache = AttentionCache(
            self.k_pages.to(dtype),
            self.v_pages.to(dtype),
            None,
            None,
            self.table_M[None],
            positions[-1:] + 1,
            self.table_M[positions // PAGE] * PAGE + positions % PAGE,
        )
        norm = torch.zeros(DIM, dtype=dtype)
        weights = AttentionWeights(norm, norm, eps=1e-6, zero_centered=True, has_gate=True, scale=DIM**-0.5)
        rope = Rope(*(x[first:end] for x in self.rope))
        rows = (x[first:end].to(dtype) for x in (self.q, self.k, self.v))
        out: Tensor = mixer(*rows, weights, rope=rope, packing=Packing([end - first]), cache=cache)  # type: ignore[operator]
        return out


@pytest.mark.parametrize("length", [LENGTH // 8, pytest.param(LENGTH, marks=pytest.mark.slow)])
def test_attention_over_many_tokens_is_that_of_fp64(length: int) -> None:
    cache = LongCache(1, num_heads=2, length=length)
    expected = cache.run(reference.attention_mixer, 0, 1, dtype=torch.float64)
    # The reference weighs a million values in fp32 with one long sum; the kernels sum chunks.
    tolerance = 2e-5 if IS_CUT_INVARIANT else 1e-3
    assert_close(cache.run(attention_mixer, 0, 1), expected, tolerance=tolerance)


@pytest.mark.skipif(not IS_CUT_INVARIANT, reason="the backend promises no bits")
def test_many_chunks_of_keys_are_merged_in_bounded_memory_to_the_same_bits() -> None:
    """128 rows over a thousand chunks are summed in several passes; one token alone takes one pass."""
    cache = LongCache(16, num_heads=8)
    together = cache.run(attention_mixer, 0, 16)
    for n in (0, 15):
        assert torch.equal(together[n : n + 1], cache.run(attention_mixer, n, n + 1))
