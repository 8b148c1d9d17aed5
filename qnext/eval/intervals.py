"""How far a measured share or mean may be from the true one: 95 % intervals. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_Z = 1.959963984540054  # of 95 %, two-sided


class Interval(NamedTuple):
    """A value between its bounds."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(hits: float, count: int) -> Interval:
    """Of a share of `count` trials, after Wilson (1927). It stays within 0 and 1, also for no hits and few trials.

    >>> [round(bound, 3) for bound in wilson(8, 10)]
    [0.8, 0.49, 0.943]
    """
    if count < 1:
        raise ValueError("no trials")
    share, squared = hits / count, _Z * _Z / count
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / count + squared / count / 4)
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Of a mean, by Student's t. One value has no bounds.

    >>> [round(bound, 2) for bound in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    return ratio_interval(values, [1.0] * len(values))


def ratio_interval(values: Sequence[float], sizes: Sequence[float]) -> Interval:
    """Of sum(values) / sum(sizes), such as bits over bytes of documents: their residuals say how far it spreads.

    Documents, not tokens, are the independent things that were drawn.
    """
    count = len(values)
    ratio = sum(values) / sum(sizes)
    if count < 2:
        return Interval(ratio, -math.inf, math.inf)
    squares = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    half = _student(count - 1) * math.sqrt(squares * count / (count - 1)) / sum(sizes)
    return Interval(ratio, ratio - half, ratio + half)


def _student(freedom: int) -> float:
    """The quantile of 97.5 % of Student's t: exact for 1 and 2 degrees of freedom, else by the expansion of Cornish and
    Fisher, which is right to 1 % from 3 on."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
