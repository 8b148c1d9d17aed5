"""Which experts go together: within a layer for the same token, and from a layer to the next one.

Legend: T tokens, E experts of a layer, F experts of the next sparse layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.routing.record import RoutingRecord

_CLOSE = 2.0  # a group has at least this mean lift between its members
_FEWEST = 5  # tokens of a pair: less is an accident


@dataclass(frozen=True)
class ExpertPair:
    """`tokens` had both. `lift` is that number over what independent choices give: 1 says nothing, 2 twice as often.
    Its base-2 logarithm is the pointwise mutual information. `score` is the surplus in standard deviations."""

    first: int
    second: int
    tokens: int
    lift: float
    score: float

    @property
    def information(self) -> float:
        return math.log2(self.lift)


@dataclass(frozen=True)
class LayerPairs:
    """Experts that tokens choose together. `groups` are experts whose mean lift with each other is 2 or more."""

    label: str
    pairs: list[ExpertPair]  # the surest first
    groups: list[list[int]]


@dataclass(frozen=True)
class LayerSteps:
    """What the choice of a layer says about that of the next sparse one: `pairs` go from the first to the second.

    `hit_ratio` is the part of the second layer's choices among the best guesses from the first layer's, as many as are
    chosen. `hit_ratio_without` is that of the busiest experts alone. Both are learnt from the even blocks of 64 tokens
    and measured on the odd ones.
    """

    label: str
    next_label: str
    pairs: list[ExpertPair]
    hit_ratio: float | None
    hit_ratio_without: float | None


@dataclass(frozen=True)
class Coactivation:
    """Of all layers, and of the steps between them."""

    layers: list[LayerPairs]
    steps: list[LayerSteps]


def coactivation(record: RoutingRecord, *, num_pairs: int = 5) -> Coactivation:
    """`num_pairs` of each kind are named."""
    return Coactivation(_together(record, num_pairs), _steps(record, num_pairs))


def _together(record: RoutingRecord, num_pairs: int) -> list[LayerPairs]:
    found = []
    for place, label in enumerate(record.labels):
        hot_TE = record.one_hot(place)
        both_EE, expected_EE = _counts(hot_TE, hot_TE)
        pairs = _surest(np.triu(both_EE, 1), np.triu(expected_EE, 1), num_pairs)
        found.append(LayerPairs(label, pairs, _groups(both_EE, expected_EE)))
    return found


def _steps(record: RoutingRecord, num_pairs: int) -> list[LayerSteps]:
    found = []
    for place in range(len(record.layers) - 1):
        hot_TE, next_TF = record.one_hot(place), record.one_hot(place + 1)
        pairs = _surest(*_counts(hot_TE, next_TF, is_same=False), num_pairs)
        hits = _hits(hot_TE, next_TF, top_k=record.chosen_LTA.shape[2])
        found.append(LayerSteps(record.labels[place], record.labels[place + 1], pairs, *hits))
    return found


def lifts(record: RoutingRecord, place: int) -> NDArray[np.float64]:
    """[E, E] lift of each pair of layer number `place`, the experts in the order of their groups, then by load;
    the diagonal is zero."""
    hot_TE = record.one_hot(place)
    both_EE, expected_EE = _counts(hot_TE, hot_TE)
    lift_EE = _lift(both_EE, expected_EE)
    order = [expert for group in _groups(both_EE, expected_EE) for expert in group]
    rest = [int(e) for e in np.argsort(-hot_TE.sum(axis=0), kind="stable") if int(e) not in set(order)]
    return lift_EE[np.ix_(order + rest, order + rest)]


def _counts(
    hot_TE: NDArray[np.float32], next_TF: NDArray[np.float32], *, is_same: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(tokens of each pair, the number that independent choices give). Within a layer no token chooses an expert twice:
    what is expected is scaled to the pairs that there are."""
    both_EF = (hot_TE.T @ next_TF).astype(np.float64)
    expected_EF = np.outer(hot_TE.sum(axis=0, dtype=np.float64), next_TF.sum(axis=0, dtype=np.float64))
    if is_same:
        np.fill_diagonal(both_EF, 0)
        np.fill_diagonal(expected_EF, 0)
    expected_EF *= both_EF.sum() / max(expected_EF.sum(), 1.0)
    return both_EF, expected_EF


def _lift(both_EF: NDArray[Any], expected_EF: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(both_EF, expected_EF, out=np.zeros_like(expected_EF), where=expected_EF > 0)


def _surest(both_EF: NDArray[Any], expected_EF: NDArray[Any], num_pairs: int) -> list[ExpertPair]:
    """The pairs with the largest surplus in standard deviations of a Poisson count."""
    score_EF = np.divide(
        both_EF - expected_EF, np.sqrt(expected_EF), out=np.zeros_like(expected_EF), where=expected_EF > 0
    )
    score_EF[both_EF < _FEWEST] = 0
    lift_EF = _lift(both_EF, expected_EF)
    places = np.argsort(-score_EF, axis=None, kind="stable")[:num_pairs]
    found = []
    for first, second in zip(*np.unravel_index(places, score_EF.shape), strict=True):
        score = float(score_EF[first, second])
        if score > 0:
            tokens, lift = int(both_EF[first, second]), float(lift_EF[first, second])
            found.append(ExpertPair(int(first), int(second), tokens, lift, score))
    return found


def _groups(both_EE: NDArray[np.float64], expected_EE: NDArray[np.float64]) -> list[list[int]]:
    """Joins the two groups with the highest mean lift, as long as it is 2. What is expected weighs, so that rare pairs
    say little. Groups of one are left out; the others come with the largest first."""
    both, expected = both_EE.copy(), expected_EE.copy()
    members = {expert: [expert] for expert in range(len(both))}
    while len(members) > 1:
        lift = np.where(both >= _FEWEST, _lift(both, expected), 0)
        first, second = (int(place) for place in np.unravel_index(lift.argmax(), lift.shape))
        if lift[first, second] < _CLOSE:
            break
        members[first] += members.pop(second)
        for sums in (both, expected):
            sums[first] += sums[second]
            sums[:, first] += sums[:, second]
            sums[second] = sums[:, second] = sums[first, first] = 0
    return sorted((sorted(each) for each in members.values() if len(each) > 1), key=lambda each: (-len(each), each))


def _hits(
    hot_TE: NDArray[np.float32], next_TF: NDArray[np.float32], *, top_k: int
) -> tuple[float | None, float | None]:
    """Share of hits of guesses from the layer before, and of the busiest experts; None for a short text."""
    is_odd_T = np.arange(len(hot_TE)) // 64 % 2 == 1
    if not is_odd_T.any():
        return None, None
    seen_EF = hot_TE[~is_odd_T].T @ next_TF[~is_odd_T]
    busy_F = next_TF[~is_odd_T].mean(axis=0)
    # An expert that was never seen says what all experts together say.
    rates_EF = (seen_EF + busy_F) / (hot_TE[~is_odd_T].sum(axis=0)[:, None] + 1)
    guesses_TF = hot_TE[is_odd_T] @ rates_EF
    best_TA = np.argpartition(-guesses_TF, top_k - 1, axis=1)[:, :top_k]
    truth_TF = next_TF[is_odd_T]
    busiest = np.argsort(-busy_F, kind="stable")[:top_k]
    hits = float(np.take_along_axis(truth_TF, best_TA, axis=1).mean())
    return hits, float(truth_TF[:, busiest].mean())
