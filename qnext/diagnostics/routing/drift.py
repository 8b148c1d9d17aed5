"""Whether the experts of two texts, or of two models on one text, differ by more than the noise of sampling.

The distance of two loads is never zero, even of two samples of the same text. So the blocks of both sides are exchanged
at random many times: what is left of the distance then is noise.

Legend: B blocks, L layers, E experts, R random exchanges or resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.routing.record import RoutingRecord
from qnext.diagnostics.statistics import NUM_RESAMPLES, resample
from qnext.errors import UsageError
from qnext.eval.intervals import Interval

SURE = 0.05  # below this probability a drift is no accident
_CHUNK = 50  # resamples at a time


@dataclass(frozen=True)
class LayerDrift:
    """`distance` is the total variation of the two loads, 0 to 1: the part of all choices that would have to move to
    make them equal. `noise` is what it is on average where both sides are alike, `interval` that of the distance.

    `probability` is that of a distance this far above its noise, in any layer, where both sides are alike.
    """

    label: str
    distance: float
    noise: float
    interval: Interval
    probability: float

    @property
    def excess(self) -> float:
        """What is more than noise; 0 where the layer has not drifted."""
        return max(0.0, self.distance - self.noise) if self.is_real else 0.0

    @property
    def is_real(self) -> bool:
        return self.probability < SURE


@dataclass(frozen=True)
class Drift:
    """`of` says what was compared."""

    of: str
    layers: list[LayerDrift]


class _Sides(NamedTuple):
    """The loads of the blocks of each side; of the same tokens where `is_paired`."""

    first_BX: NDArray[np.float64]
    second_BX: NDArray[np.float64]
    is_paired: bool


def drift(first: RoutingRecord, second: RoutingRecord, *, of: str, is_paired: bool, seed: int = 0) -> Drift:
    """Compares every layer. `is_paired` says that both records are of the same tokens. Raises UsageError for records of
    different layers or experts. A text of a few tokens proves nothing: its drift is never sure."""
    if (first.layers, first.num_experts) != (second.layers, second.num_experts):
        raise UsageError("the models have different layers or numbers of experts, so their loads cannot be compared")
    a_BLE, b_BLE = first.block_counts(), second.block_counts()
    num_layers = len(first.layers)
    a_BX, b_BX = (counts.reshape(len(counts), -1).astype(np.float64) for counts in (a_BLE, b_BLE))
    sides = _Sides(a_BX, b_BX, is_paired)
    found_L = _distances(a_BX.sum(axis=0)[None], b_BX.sum(axis=0)[None], num_layers)[0]
    null_RL = _exchanged(sides, num_layers, seed)
    noise_L, spread_L = null_RL.mean(axis=0), np.maximum(null_RL.std(axis=0), 1e-12)
    # Of all layers together: with 48 of them, two are beyond their own 95 % by accident.
    largest_R = ((null_RL - noise_L) / spread_L).max(axis=1)
    height_L = (found_L - noise_L) / spread_L
    likely_L = (1 + (largest_R[:, None] >= height_L).sum(axis=0)) / (1 + len(largest_R))
    again_RL = _resampled(sides, num_layers, seed)
    low_L, high_L = (2 * found_L - np.quantile(again_RL, q, axis=0) for q in (0.975, 0.025))
    columns = (each.tolist() for each in (found_L, noise_L, low_L, high_L, likely_L))
    return Drift(
        of,
        [
            LayerDrift(label, distance, noise, Interval(distance, max(0.0, low), min(1.0, high)), likely)
            for label, distance, noise, low, high, likely in zip(first.labels, *columns, strict=True)
        ],
    )


def _distances(a_RX: NDArray[np.float64], b_RX: NDArray[np.float64], num_layers: int) -> NDArray[np.float64]:
    """[R, L] total variation"""
    shares = []
    for counts_RX in (a_RX, b_RX):
        counts_RLE = counts_RX.reshape(len(counts_RX), num_layers, -1)
        shares.append(counts_RLE / np.maximum(counts_RLE.sum(axis=2, keepdims=True), 1))
    return np.asarray(np.abs(shares[0] - shares[1]).sum(axis=2) / 2)


def _exchanged(sides: _Sides, num_layers: int, seed: int) -> NDArray[np.float64]:
    """[R, L] distances after blocks have changed sides at random: within each pair, or all among each other."""
    a_BX, b_BX, is_paired = sides
    generator = np.random.default_rng(seed)
    pool_BX = np.concatenate((a_BX, b_BX))
    all_X, found = pool_BX.sum(axis=0), []
    for _ in range(0, NUM_RESAMPLES, _CHUNK):
        if is_paired:
            stays_RB = generator.integers(0, 2, (_CHUNK, len(a_BX))).astype(np.float64)
            is_first_RB = np.concatenate((stays_RB, 1 - stays_RB), axis=1)
        else:
            order_RB = generator.random((_CHUNK, len(pool_BX))).argsort(axis=1)
            is_first_RB = (order_RB < len(a_BX)).astype(np.float64)
        first_RX = is_first_RB @ pool_BX
        found.append(_distances(first_RX, all_X - first_RX, num_layers))
    return np.concatenate(found)


def _resampled(sides: _Sides, num_layers: int, seed: int) -> NDArray[np.float64]:
    """[R, L] distances of blocks drawn with replacement; pairs are drawn together."""
    first_RB = resample(len(sides.first_BX), seed=seed + 1)
    second_RB = first_RB if sides.is_paired else resample(len(sides.second_BX), seed=seed + 2)
    found = []
    for start in range(0, NUM_RESAMPLES, _CHUNK):
        rows = slice(start, start + _CHUNK)
        found.append(_distances(first_RB[rows] @ sides.first_BX, second_RB[rows] @ sides.second_BX, num_layers))
    return np.concatenate(found)
