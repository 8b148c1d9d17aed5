"""How alike two models choose experts on the same tokens: after quantising, after tuning.

Legend: L layers, T tokens, A chosen experts, E experts, P scored positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.routing.record import RoutingRecord
from qnext.diagnostics.statistics import block_interval
from qnext.errors import UsageError
from qnext.eval.intervals import Interval

_NUM_PARTS = 8  # of a text, to see whether agreement falls with the position


@dataclass(frozen=True)
class LayerAgreement:
    """Means over tokens. `overlap` is the common part of the two sets of chosen experts, `same_set` the share of tokens
    whose sets are equal, `same_first` of those whose most probable expert is.

    `divergence` is KL(first || second) of the probabilities of all experts, in nats. `rank_correlation` is Spearman's,
    of the probabilities of each token; None where a router is constant.
    """

    label: str
    overlap: float
    interval: Interval  # of the overlap
    same_set: float
    same_first: float
    divergence: float
    rank_correlation: float | None


@dataclass(frozen=True)
class Agreement:
    """`by_position` has the mean overlap of eight consecutive parts of the text. `worst` are the positions where the
    fewest choices agree, over all layers, with their overlap."""

    layers: list[LayerAgreement]
    by_position: list[float]
    worst: list[tuple[int, float]]

    @property
    def overlap(self) -> float:
        return float(np.mean([layer.overlap for layer in self.layers]))


def agreement(first: RoutingRecord, second: RoutingRecord, *, num_worst: int = 5) -> Agreement:
    """Compares two records of the same tokens, both with scores. Raises UsageError for other layers or experts."""
    if (first.layers, first.chosen_LTA.shape) != (second.layers, second.chosen_LTA.shape):
        raise UsageError("the models have different layers or numbers of experts, so their choices cannot be compared")
    common_LT = np.stack([_common(first, second, place) for place in range(len(first.layers))])
    layers = [_layer(first, second, place, common_LT[place]) for place in range(len(first.layers))]
    overlap_T = common_LT.mean(axis=0)
    parts = np.array_split(overlap_T, min(_NUM_PARTS, len(overlap_T)))
    worst = np.argsort(overlap_T, kind="stable")[:num_worst]
    return Agreement(
        layers,
        [float(part.mean()) for part in parts],
        [(int(place), float(overlap_T[place])) for place in worst if overlap_T[place] < 1],
    )


def _common(first: RoutingRecord, second: RoutingRecord, place: int) -> NDArray[np.float64]:
    """[T] the part of each token's choice that both models share"""
    a_TA1, b_T1A = first.chosen_LTA[place][:, :, None], second.chosen_LTA[place][:, None, :]
    return np.asarray((a_TA1 == b_T1A).any(axis=2).mean(axis=1))


def _layer(first: RoutingRecord, second: RoutingRecord, place: int, common_T: NDArray[np.float64]) -> LayerAgreement:
    a_PE, b_PE = first.log_probs_LPE[place], second.log_probs_LPE[place]
    correlations_P = _rank_correlations(a_PE, b_PE)
    known_P = correlations_P[~np.isnan(correlations_P)]
    return LayerAgreement(
        label=first.labels[place],
        overlap=float(common_T.mean()),
        interval=block_interval(common_T),
        same_set=float((common_T == 1).mean()),
        same_first=float((a_PE.argmax(axis=1) == b_PE.argmax(axis=1)).mean()),
        divergence=max(0.0, float((np.exp(a_PE) * (a_PE - b_PE)).sum(axis=1, dtype=np.float64).mean())),
        rank_correlation=float(known_P.mean()) if len(known_P) else None,
    )


def _rank_correlations(a_PE: NDArray[np.float32], b_PE: NDArray[np.float32]) -> NDArray[np.float64]:
    """[P] of the ranks of each row; NaN where a row is constant. Equal values are ranked in the order of experts."""
    middle = (a_PE.shape[1] - 1) / 2
    ranks = [np.argsort(np.argsort(x_PE, axis=1, kind="stable"), axis=1) - middle for x_PE in (a_PE, b_PE)]
    size = (ranks[0] ** 2).sum(axis=1)
    found_P = np.full(len(a_PE), np.nan)
    varies_P = (a_PE.min(axis=1) < a_PE.max(axis=1)) & (b_PE.min(axis=1) < b_PE.max(axis=1))
    np.divide((ranks[0] * ranks[1]).sum(axis=1), size, out=found_P, where=varies_P & (size > 0))
    return found_P
