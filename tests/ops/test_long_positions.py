"""Positions up to 1,010,000: angles against fp64, attention over a paged cache of that length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import AttentionCache, Packing, attention_mixer
from qnext.ops.backend import is_native
from qnext.ops.reference import attention_mixer as reference
from qnext.ops.reference import rope as reference_rope

from .compare import assert_close, randn

LENGTH, PAGE, DIM, KV_HEADS = 1_010_000, 16, 32, 1


def released_frequencies() -> tuple[Tensor, float]:
    return ops.yarn_frequencies(
        64, theta=1e7, factor=4.0, original_length=262_144, beta_fast=32.0, beta_slow=1.0, attention_factor=None,
        truncate=True,
    )  # fmt: skip


@pytest.mark.parametrize("end", [1_000, 262_144, LENGTH])
@pytest.mark.parametrize("cos_sin", [ops.rope_cos_sin, reference_rope.rope_cos_sin])
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
            ops.apply_rope(x, *ops.rope_cos_sin(p, frequencies, attention_factor=factor))
            for x, p in zip((q, k), positions, strict=True)
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(LENGTH - 1, 77) == pytest.approx(score(100, 77), rel=1e-5)


class LongCache:
    """A sequence of LENGTH tokens whose last `num_new` are computed; its table names few pages again and again."""

    def __init__(self, num_new: int, *, num_heads: int) -> None:
        num_pages, tail = -(-LENGTH // PAGE), -(-num_new // PAGE) + 1
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
        self.positions = torch.arange(LENGTH - num_new, LENGTH)
        self.cos, self.sin = ops.rope_cos_sin(self.positions, frequencies)

    def run(self, mixer: object, first: int, end: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The mixer on new tokens [first, end)."""
        positions = self.positions[first:end]
        cache = AttentionCache(
            self.k_pages.to(dtype), self.v_pages.to(dtype), None, None, self.table_M[None],
            positions[-1:] + 1, self.table_M[positions // PAGE] * PAGE + positions % PAGE,
        )  # fmt: skip
        out: Tensor = mixer(  # type: ignore[operator]
            *(x[first:end].to(dtype) for x in (self.q, self.k, self.v)),
            q_norm_weight_K=torch.zeros(DIM, dtype=dtype), k_norm_weight_K=torch.zeros(DIM, dtype=dtype), eps=1e-6,
            zero_centered=True, has_gate=True, cos=self.cos[first:end], sin=self.sin[first:end],
            packing=Packing([end - first]), scale=DIM**-0.5, cache=cache,
        )  # fmt: skip
        return out


def test_attention_at_a_million_tokens_is_that_of_fp64() -> None:
    cache = LongCache(1, num_heads=2)
    expected = cache.run(reference.attention_mixer, 0, 1, dtype=torch.float64)
    # The reference weighs a million values in fp32 with one long sum; the kernels sum chunks.
    tolerance = 2e-5 if is_native(torch.device("cpu")) else 1e-3
    assert_close(cache.run(attention_mixer, 0, 1), expected, tolerance=tolerance)


@pytest.mark.skipif(not is_native(torch.device("cpu")), reason="native kernels alone promise bits")
def test_many_chunks_of_keys_are_merged_in_bounded_memory_to_the_same_bits() -> None:
    """128 rows over a thousand chunks are summed in several passes; one token alone takes one pass."""
    cache = LongCache(16, num_heads=8)
    together = cache.run(attention_mixer, 0, 16)
    for n in (0, 15):
        assert torch.equal(together[n : n + 1], cache.run(attention_mixer, n, n + 1))
