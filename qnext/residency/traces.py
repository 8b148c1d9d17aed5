"""Routing that looks like that of real traffic, for measuring residency without a trained model.

An expert's score at a token is a popularity by rank, two slowly changing parts (AR(1) processes) and Gumbel noise; the
best are chosen, in each layer on its own. The presets were fitted to published hit rates: `uniform` is what random
weights do, `diverse` mixed text on Qwen3.8-Flash-Next (512 experts, 10 of them: a cache of 93, 186 or 372 hits 44, 62
or 79 %), `service` long answers on one subject (82, 93 or 98 %). Layers do not know of each other.

Legend: T tokens, E experts, A experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_FLAT_LAYERS, _FLATTER = 3, 0.6  # the first layers of a real model have less of a hot set


class Preset(NamedTuple):
    """Slope of popularity over the logarithm of the rank; strength and persistence of a fast and of a slow part."""

    slope: float
    fast: float = 0.0
    fast_persistence: float = 0.0
    slow: float = 0.0
    slow_persistence: float = 0.0


PRESETS = {
    "uniform": Preset(0.0),
    "diverse": Preset(0.85, 2.5, 0.5, 1.0, 0.97),
    "mixed": Preset(1.2, 2.5, 0.7, 1.0, 0.99),
    "service": Preset(1.8, 2.5, 0.7, 2.0, 0.998),
}


class RoutingTrace:
    """Experts of one token after the other, for one layer; the same for the same seed and layer."""

    def __init__(self, preset: str, *, num_experts: int, top_k: int, layer: int, seed: int = 0) -> None:
        """Raises KeyError for a preset that is none."""
        self._preset, self._top_k, self._num_experts = PRESETS[preset], top_k, num_experts
        self._rng = np.random.default_rng((seed, layer))
        slope = self._preset.slope * (_FLATTER if layer < _FLAT_LAYERS else 1.0)
        self._popularity = -slope * np.log(np.arange(1, num_experts + 1))
        self._rng.shuffle(self._popularity)
        self._fast, self._slow = self._rng.normal(size=num_experts), self._rng.normal(size=num_experts)

    def take(self, num_tokens: int) -> NDArray[np.int64]:
        """[T, A] experts of the next tokens, each row ascending."""
        preset, rng = self._preset, self._rng
        rows = np.empty((num_tokens, self._top_k), dtype=np.int64)
        for row in rows:
            self._fast = _next(self._fast, preset.fast_persistence, rng)
            self._slow = _next(self._slow, preset.slow_persistence, rng)
            score = self._popularity + preset.fast * self._fast + preset.slow * self._slow
            score += rng.gumbel(size=self._num_experts)
            row[:] = np.sort(np.argpartition(-score, self._top_k)[: self._top_k])
        return rows


def _next(values_E: NDArray[np.float64], persistence: float, rng: np.random.Generator) -> NDArray[np.float64]:
    noise = rng.normal(size=len(values_E))
    return persistence * values_E + np.sqrt(1 - persistence * persistence) * noise
