"""Intervals and ranks for figures that are means over a text.

Tokens near each other are alike, so a text is resampled in blocks of neighbours, never token by token.

Legend: B blocks, R resamples, N values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.eval.intervals import Interval, ratio_interval

NUM_RESAMPLES = 1000
BLOCK_TOKENS = 64
_FEWEST_BLOCKS = 16  # a short text has shorter blocks


def block_starts(num_tokens: int) -> NDArray[np.int64]:
    """Where the blocks of a text begin: blocks of about 64 tokens, and 16 of them at least where there are so many
    tokens."""
    assert num_tokens > 0
    num_blocks = max(num_tokens // BLOCK_TOKENS, min(_FEWEST_BLOCKS, num_tokens))
    return np.arange(num_blocks, dtype=np.int64) * num_tokens // num_blocks


def block_interval(values_T: NDArray[Any]) -> Interval:
    """Of the mean of a value per token, from its blocks."""
    starts_B = block_starts(len(values_T))
    sums_B = np.add.reduceat(values_T.astype(np.float64), starts_B)
    return ratio_interval(sums_B.tolist(), np.diff(np.append(starts_B, len(values_T))).tolist())


def resample(num_blocks: int, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> NDArray[np.float64]:
    """[R, B]: how often each block is drawn, as many draws as blocks."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=num_resamples).astype(np.float64)


def spearman(a_N: NDArray[Any], b_N: NDArray[Any]) -> float | None:
    """Correlation of the ranks, ties sharing their mean rank; None where one side is constant or has one value."""
    if len(a_N) < 2:
        return None
    ranks = [_ranks(values_N) - (len(values_N) - 1) / 2 for values_N in (a_N, b_N)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / size) if size else None


def _ranks(values_N: NDArray[Any]) -> NDArray[np.float64]:
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return np.asarray((last - (counts - 1) / 2)[place_N], dtype=np.float64)
