"""The mark of an answer: scores that are tilted by a key, and how strongly a text shows the key.

Both schemes change what is drawn from, and nothing of how: the request's own number draws the token, so seeds, drafts,
constraints and batches keep their meaning. Legend: C candidates, T scored tokens, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.engine.policy.watermark_key import MarkedPlaces, WatermarkKey
from qnext.engine.sampling.filters import Row, Tilt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_LEAST_SCORE = -30.0  # nats below the best: all such tokens together weigh less than fp32 can tell
_FIRST_WEIGHT, _LAST_WEIGHT = 10.0, 1.0  # of the layers of a tournament, as published: the first have most to say


class Mark(NamedTuple):
    """That of one place of an answer."""

    key: WatermarkKey
    seed: int

    @classmethod
    def at(cls, marks: MarkedPlaces, output_ids: list[int], more: tuple[int, ...]) -> Mark | None:
        """Of the place behind the tokens of an answer; None where it is not marked."""
        seed = marks.seed(output_ids, more)
        return None if seed is None else cls(marks.key, seed)

    @classmethod
    def guess(cls, marks: MarkedPlaces, output_ids: list[int], more: tuple[int, ...]) -> Mark | None:
        """The same for a draft, as if no context came twice: nothing is remembered of it."""
        context = (*output_ids[-marks.key.context :], *more)[-marks.key.context :]
        return None if len(context) < marks.key.context else cls(marks.key, marks.key.seed(context))

    def with_green_list(self, row_Y: Row) -> Row:
        """A copy of the logits in which those of the green tokens are higher; of a tournament the row as it is."""
        if self.key.scheme != "green":
            return row_Y
        is_green_Y = _is_green(bits_of(self.seed, np.arange(len(row_Y))), self.key.gamma)
        return row_Y + np.float32(self.key.delta) * is_green_Y.astype(np.float32)

    @property
    def tilt(self) -> Tilt | None:
        return None if self.key.scheme == "green" else partial(tournament_weights, key=self.key, seed=self.seed)


def bits_of(seed: int | NDArray[np.uint64], ids_C: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 bits for each token under the seed of a place, or of its own place: SplitMix64 of seed and token."""
    value = ids_C.astype(np.uint64) * _GOLDEN
    value += np.asarray(seed, dtype=np.uint64)
    value ^= value >> np.uint64(30)
    value *= _FACTORS[0]
    value ^= value >> np.uint64(27)
    value *= _FACTORS[1]
    value ^= value >> np.uint64(31)
    return value


def tournament_weights(scores_C: Row, ids_C: NDArray[np.intp], *, key: WatermarkKey, seed: int) -> NDArray[np.float64]:
    """What to draw from: the distribution of who wins a tournament of 2^L tokens drawn from exp(scores).

    In each layer the token with the higher bit of a pair wins. Over all keys each token is as likely as before.
    """
    weights_C = np.exp(scores_C.astype(np.float64))
    weights_C /= weights_C.sum()
    can_win = np.flatnonzero(scores_C >= _LEAST_SCORE)
    kept_C, bits_C = weights_C[can_win], bits_of(seed, ids_C[can_win])
    for layer in range(key.layers):
        has_bit_C = (bits_C >> np.uint64(layer)) & np.uint64(1) != 0
        mass = float(kept_C[has_bit_C].sum() / kept_C.sum())
        kept_C *= np.where(has_bit_C, 2.0 - mass, 1.0 - mass)
    found_C = np.zeros_like(weights_C)
    found_C[can_win] = kept_C
    return found_C


class MarkScore(NamedTuple):
    """How strongly a text shows a key. `p_value` is the chance that a text without the mark scores so high.

    `num_scored` counts the tokens behind contexts that come for the first time. `mean` is 0.5 on average without a
    mark for a tournament, and the share `gamma` for a green list.
    """

    num_tokens: int
    num_scored: int
    mean: float
    z: float
    p_value: float


def score(token_ids: Sequence[int], key: WatermarkKey) -> MarkScore:
    """Look for the mark in the tokens of a text. Of no scored token the p-value is 1."""
    width = key.context
    seen: set[int] = set()
    places: list[tuple[int, int]] = []
    ids = list(map(int, token_ids))
    for place in range(width, len(ids)):
        seed = key.seed(tuple(ids[place - width : place]))
        if seed not in seen:
            seen.add(seed)
            places.append((seed, ids[place]))
    if not places:
        return MarkScore(len(ids), 0, 0.0, 0.0, 1.0)
    seeds, tokens = zip(*places, strict=True)
    bits_T = bits_of(np.array(seeds, dtype=np.uint64), np.array(tokens))
    found = _green_score(bits_T, key) if key.scheme == "green" else _tournament_score(bits_T, key)
    return MarkScore(len(ids), len(places), *found)


def _is_green(bits: NDArray[np.uint64], gamma: float) -> NDArray[np.bool_]:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 < gamma


def _green_score(bits_T: NDArray[np.uint64], key: WatermarkKey) -> tuple[float, float, float]:
    count, number = int(_is_green(bits_T, key.gamma).sum()), len(bits_T)
    z = (count - key.gamma * number) / math.sqrt(number * key.gamma * (1 - key.gamma))
    return count / number, z, _binomial_tail(count, number, key.gamma)


def _tournament_score(bits_T: NDArray[np.uint64], key: WatermarkKey) -> tuple[float, float, float]:
    """Bits of texts without the mark are fair coins. Their weighted sum has lighter tails than a normal number."""
    layers_L = np.arange(key.layers, dtype=np.uint64)
    weights_L = np.linspace(_FIRST_WEIGHT, _LAST_WEIGHT, key.layers)
    weights_L /= weights_L.sum()
    bits_TL = (bits_T[:, None] >> layers_L & np.uint64(1)).astype(np.float64)
    mean = float((bits_TL @ weights_L).mean())
    z = (mean - 0.5) / math.sqrt(float(np.square(weights_L).sum()) / 4 / len(bits_T))
    return mean, z, 0.5 * math.erfc(z / math.sqrt(2))


def _binomial_tail(least: int, number: int, chance: float) -> float:
    """The exact chance of at least so many of so many."""
    log_all = math.lgamma(number + 1)
    terms = (
        log_all
        - math.lgamma(k + 1)
        - math.lgamma(number - k + 1)
        + k * math.log(chance)
        + (number - k) * math.log1p(-chance)
        for k in range(least, number + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))
