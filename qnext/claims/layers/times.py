"""Seconds of single layers to seconds of whole models: arithmetic, round by round, so that results have intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qnext.claims.layers.shapes import Compared

LayerSeconds = Mapping[str, float]  # by the name of a layer


class Line(NamedTuple):
    """Seconds of a token behind so many others: `base + slope * context`. `error` is the largest relative distance of a
    measured point from it."""

    base: float
    slope: float
    error: float

    def prompt(self, num_tokens: int) -> float:
        """Seconds of a layer for a whole prompt."""
        return num_tokens * (self.base + self.slope * num_tokens / 2)


def fitted_line(points: Sequence[tuple[float, float]]) -> Line:
    """Through (context, seconds of a token), with the least relative squares: short contexts count as much as long
    ones."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * context for w, (context, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (context - x) ** 2 for w, (context, _) in zip(weights, points, strict=True))
    slope = sum(w * (c - x) * (s - y) for w, (c, s) in zip(weights, points, strict=True)) / spread if spread else 0.0
    base = y - slope * x
    error = max(abs(base + slope * context - seconds) / seconds for context, seconds in points)
    return Line(base, slope, error)


def step_seconds(layers: LayerSeconds, of: Compared) -> tuple[float, float]:
    """A decoding step of the hybrid model and of the dense one: their layers without the frame, and their heads."""
    linear, full, dense = of.layer_counts
    frame, dense_frame = layers["frame"], layers["dense frame"]
    hybrid = linear * (layers["linear"] - frame) + full * (layers["full"] - frame)
    rows = of.hybrid.vocab_size / of.head_rows
    head = rows * (layers["head"] - frame) + frame
    dense_head = rows * (layers["dense head"] - dense_frame) + dense_frame
    return hybrid + head, dense * (layers["dense"] - dense_frame) + dense_head


def median_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of the steps of a round; the first warms up."""
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
