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
    frame, dense = layers["dense frame"], of.layer_counts[2]
    dense_head = _head_rows(of) * (layers["dense head"] - frame) + frame
    return hybrid_step(layers, of), dense * (layers["dense"] - frame) + dense_head


def hybrid_step(layers: LayerSeconds, of: Compared) -> float:
    """A decoding step of the hybrid model alone."""
    linear, full, _ = of.layer_counts
    frame = layers["frame"]
    return linear * (layers["linear"] - frame) + full * (layers["full"] - frame) + _hybrid_head(layers, of) + frame


def draft_seconds(layers: LayerSeconds, of: Compared) -> float:
    """A token drafted by the MTP layer: a full layer and the head, without the small matrix before the layer."""
    return layers["full"] - layers["frame"] + _hybrid_head(layers, of)


def _hybrid_head(layers: LayerSeconds, of: Compared) -> float:
    return _head_rows(of) * (layers["head"] - layers["frame"])


def _head_rows(of: Compared) -> float:
    return of.hybrid.vocab_size / of.head_rows


def median_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of the steps of a round; the first warms up."""
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
