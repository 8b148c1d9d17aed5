"""One row of scores to one token. Rows are taken one by one, so that no other row changes a row's bits.

Whole rows are read by few passes: what a filter can keep is first bounded from below, and sorting is left to the few
tokens above the bound. Legend: Y vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.engine.policy.params import SamplingParams

Row = NDArray[np.float32]

# Scores of candidates and their ids to what is drawn from.
Tilt = Callable[[Row, NDArray[np.intp]], NDArray[np.float64]]

_BLOCK = 512
_FIRST_GUESS = 64


class Candidates(NamedTuple):
    """Tokens that may be drawn, in the order of the vocabulary, and their scores: scaled, at most 0."""

    ids_C: NDArray[np.intp]
    scores_C: Row


def draw(row_Y: Row, params: SamplingParams, number: float, mark: Tilt | None = None) -> int:
    """The token at `number` in [0, 1) of the cumulative distribution in the order of the vocabulary, after `mark` has
    tilted it.

    `row_Y` holds finite logits or -inf for tokens that are never drawn; at least one is finite.
    """
    kept = candidates(row_Y, params)
    if mark is not None:
        if kept is None:
            kept = Candidates(np.arange(len(row_Y)), scaled(row_Y, row_Y.max(), params))
        return _at(kept.ids_C, mark(kept.scores_C, kept.ids_C), number)
    if kept is None:
        return _draw_of_all(scaled(row_Y, row_Y.max(), params), number)
    return _at(kept.ids_C, np.exp(kept.scores_C.astype(np.float64)), number)


def _at(ids_C: NDArray[np.intp], weights_C: NDArray[np.float64], number: float) -> int:
    cumulative_C = weights_C.cumsum()
    return int(ids_C[np.searchsorted(cumulative_C, number * cumulative_C[-1], side="right")])


def scaled(row_Y: Row, best: np.float32, params: SamplingParams) -> Row:
    """Temperature-scaled scores, at most 0. What overflows is -inf, without any weight; nothing becomes NaN."""
    with np.errstate(over="ignore"):
        return row_Y - best if params.temperature == 1 else (row_Y - best) / np.float32(params.temperature)


def candidates(row_Y: Row, params: SamplingParams) -> Candidates | None:
    """What min_p, top_k and top_p leave; None when all three are off.

    Each filter keeps what is at least as likely as a threshold, so ties at the border are kept.
    """
    has_top_k = 0 < params.top_k < len(row_Y)
    if not (has_top_k or params.min_p > 0 or params.top_p < 1):
        return None
    best = row_Y.max()
    if has_top_k:
        kept = _most_likely(row_Y, best, params)
    elif params.min_p > 0:
        kept = _at_least(scaled(row_Y, best, params), _floor_of_min_p(params))
    else:
        return _nucleus_of_all(scaled(row_Y, best, params), params.top_p)
    if has_top_k and params.min_p > 0:
        kept = _subset(kept, _floor_of_min_p(params))
    if params.top_p < 1:
        kept = _subset(kept, _nucleus_floor(kept.scores_C, params.top_p))
    return kept


def floor_of_most_likely(row_Y: Row, count: int) -> np.float32:
    """A value that at least `count` entries reach, and seldom many more: from the maxima of many strided groups."""
    groups = max(1024, 8 * count)
    length = len(row_Y) // groups
    if length < 2:
        return np.partition(row_Y, len(row_Y) - count)[len(row_Y) - count]
    maxima = row_Y[: length * groups].reshape(length, groups).max(axis=0)
    return np.partition(maxima, groups - count)[groups - count]


def _most_likely(row_Y: Row, best: np.float32, params: SamplingParams) -> Candidates:
    floor = floor_of_most_likely(row_Y, params.top_k)
    ids_C = np.flatnonzero(row_Y >= floor)
    kept = Candidates(ids_C, scaled(row_Y[ids_C], best, params))
    last = np.partition(kept.scores_C, len(ids_C) - params.top_k)[len(ids_C) - params.top_k]
    # Different logits can be one score after scaling: what lies just below the floor may tie with the last one kept.
    with np.errstate(over="ignore"):  # below the lowest number is none
        below = np.nextafter(floor, np.float32(-np.inf))
    if scaled(np.array([below]), best, params)[0] >= last:
        return _at_least(scaled(row_Y, best, params), last)
    return _subset(kept, last)


def _at_least(scores_Y: Row, floor: np.float32) -> Candidates:
    ids_C = np.flatnonzero(scores_Y >= floor)
    return Candidates(ids_C, scores_Y[ids_C])


def _subset(kept: Candidates, floor: np.float32) -> Candidates:
    is_kept = kept.scores_C >= floor
    return Candidates(kept.ids_C[is_kept], kept.scores_C[is_kept])


def _floor_of_min_p(params: SamplingParams) -> np.float32:
    return np.float32(math.log(params.min_p))


def _nucleus_floor(scores_C: Row, top_p: float, total: float | None = None) -> np.float32:
    """The score of the last token of the smallest set that holds `top_p` of `total` (default: all of them)."""
    descending = np.sort(scores_C)[::-1]
    mass = np.exp(descending.astype(np.float64)).cumsum()
    # Token i is kept when the tokens before it hold less than top_p.
    count = np.searchsorted(mass, top_p * (mass[-1] if total is None else total), side="left")
    return descending[min(int(count), len(descending) - 1)]


def _nucleus_of_all(scores_Y: Row, top_p: float) -> Candidates:
    total = float(_block_sums(np.exp(scores_Y)).sum())
    # All tokens below the second floor hold at most 1 - top_p together; half of that leaves room for rounding.
    sure = math.log((1 - top_p) * total / len(scores_Y) / 2) if top_p < 1 - 1e-5 else -math.inf
    guess = floor_of_most_likely(scores_Y, min(_FIRST_GUESS, len(scores_Y)))
    for floor in (np.float32(max(sure, float(guess))), np.float32(sure)):
        kept = _at_least(scores_Y, floor)
        mass = float(np.exp(kept.scores_C.astype(np.float64)).sum())
        if mass > top_p * total * (1 + 1e-6):
            return _subset(kept, _nucleus_floor(kept.scores_C, top_p, total))
    return _subset(kept, _nucleus_floor(kept.scores_C, top_p))


def _block_sums(weights_Y: Row) -> NDArray[np.float64]:
    whole = len(weights_Y) - len(weights_Y) % _BLOCK
    sums = weights_Y[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    return np.append(sums, weights_Y[whole:].sum(dtype=np.float64))


def _draw_of_all(scores_Y: Row, number: float) -> int:
    weights_Y = np.exp(scores_Y)
    sums = _block_sums(weights_Y)
    ends = sums.cumsum()
    target = number * ends[-1]
    block = int(np.searchsorted(ends, target, side="right"))
    start = block * _BLOCK
    inside = weights_Y[start : start + _BLOCK].cumsum(dtype=np.float64)
    target -= ends[block - 1] if block else 0.0
    # Sums in another order may fall short of the target by a rounding: then it is the last token with any weight.
    target = min(target, np.nextafter(inside[-1], 0.0))
    return start + int(np.searchsorted(inside, target, side="right"))
