"""Rows of logits to tokens where the logits are, so that only what was chosen comes to the host.

The filters and the draw are those of `filters.py`, for many rows at once, each with its own parameters and number. Of a
row whose filters keep more than the C likeliest tokens nothing is said: the host takes it.

Legend: R rows, S some of them, Y vocabulary, C candidates in falling order, B blocks of the vocabulary, K told tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.policy.params import SamplingParams
from qnext.engine.policy.request import SampledToken

NUM_CANDIDATES = 512
_BLOCK = 512  # as in filters.py


class RowDraw(NamedTuple):
    """What a row is to be drawn by: parameters that leave the logits as they are, and a number in [0, 1)."""

    params: SamplingParams
    number: float


class RowChoice(NamedTuple):
    """Of one row: its likeliest token, whether it is finite, and the token that was drawn; None where the host is to
    draw."""

    best_id: int
    is_finite: bool
    token: SampledToken | None


def choose(logits_RY: Tensor, draws: Sequence[RowDraw | None]) -> list[RowChoice]:
    """The choice of each row, after one transfer to the host. A row without a draw has no token."""
    told = _ForHost()
    ids_R = logits_RY.argmax(dim=-1)
    told.add("best", ids_R, logits_RY.gather(1, ids_R[:, None])[:, 0])
    warm = [(row, draw) for row, draw in enumerate(draws) if draw is not None and not draw.params.is_greedy]
    groups = {
        "filtered": [(row, draw) for row, draw in warm if _is_filtered(draw.params, logits_RY.shape[1])],
        "all": [(row, draw) for row, draw in warm if not _is_filtered(draw.params, logits_RY.shape[1])],
    }
    drawn_R, is_sure_R = ids_R.clone(), torch.ones_like(ids_R)
    for name, group in groups.items():
        if group:
            rows_S = _numbers([row for row, _ in group], logits_RY, torch.long)
            scores_SY = _scaled(logits_RY, rows_S, ids_R, [draw.params for _, draw in group])
            token_S, sure_S = (_draw_filtered if name == "filtered" else _draw_of_all)(scores_SY, [d for _, d in group])
            drawn_R[rows_S], is_sure_R[rows_S] = token_S, sure_S.long()
    told.add("drawn", drawn_R, is_sure_R)
    wanted = [row for row, draw in enumerate(draws) if draw is not None and draw.params.logprobs is not None]
    if wanted:
        most = max(draws[row].params.logprobs or 0 for row in wanted)  # type: ignore[union-attr]
        told.add("logprobs", *_logprobs(logits_RY[_numbers(wanted, logits_RY, torch.long)], drawn_R[wanted], most))
    return _choices(draws, wanted, told.read())


class _ForHost:
    """What goes to the host: tensors by name, as fp64, which holds ids and fp32 exactly."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, Tensor]] = []

    def add(self, name: str, *tensors: Tensor) -> None:
        self._parts += [(name, tensor) for tensor in tensors]

    def read(self) -> dict[str, list[NDArray[np.float64]]]:
        """One transfer, for which the host waits."""
        flat = torch.cat([tensor.double().flatten() for _, tensor in self._parts]).cpu().numpy()
        found: dict[str, list[NDArray[np.float64]]] = {}
        start = 0
        for name, tensor in self._parts:
            found.setdefault(name, []).append(flat[start : start + tensor.numel()].reshape(tensor.shape))
            start += tensor.numel()
        return found


def _choices(
    draws: Sequence[RowDraw | None], wanted: list[int], told: dict[str, list[NDArray[np.float64]]]
) -> list[RowChoice]:
    (best_R, value_R), (drawn_R, sure_R) = told["best"], told["drawn"]
    scored = dict(zip(wanted, _scored_tokens(told, [draws[row] for row in wanted]), strict=True)) if wanted else {}
    found = []
    for row, draw in enumerate(draws):
        token = SampledToken(int(drawn_R[row])) if draw is not None else None
        if draw is not None and draw.params.logprobs is not None:
            token = scored[row]
        found.append(RowChoice(int(best_R[row]), math.isfinite(value_R[row]), token if sure_R[row] else None))
    return found


def _scored_tokens(
    told: dict[str, list[NDArray[np.float64]]], draws: Sequence[RowDraw | None]
) -> Iterator[SampledToken | None]:
    """With log-probabilities, None where equal logits lie at the border of the candidates."""
    drawn_S, logit_S, offset_S, ids_SK, logits_SK, last_S = told["logprobs"]
    for s, draw in enumerate(draws):
        assert draw is not None
        count = min(draw.params.logprobs or 0, ids_SK.shape[1])
        if count and logits_SK[s, count - 1] <= last_S[s]:
            yield None
            continue
        offset = float(offset_S[s])
        top = zip(ids_SK[s, :count], logits_SK[s, :count], strict=True)
        yield SampledToken(
            int(drawn_S[s]), float(logit_S[s]) - offset, tuple((int(i), float(value) - offset) for i, value in top)
        )


def _is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.min_p > 0 or params.top_p < 1


def _numbers(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def _scaled(logits_RY: Tensor, rows_S: Tensor, best_R: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[S, Y]: temperature-scaled scores, at most 0, with the bits of filters.scaled."""
    rows_SY = logits_RY if len(rows_S) == len(logits_RY) else logits_RY[rows_S]
    best_S1 = rows_SY.gather(1, best_R[rows_S][:, None])
    scores_SY = rows_SY - best_S1
    if any(each.temperature != 1 for each in params):
        scores_SY /= _numbers([each.temperature for each in params], logits_RY, torch.float32)[:, None]
    return scores_SY


def _draw_filtered(scores_SY: Tensor, draws: Sequence[RowDraw]) -> tuple[Tensor, Tensor]:
    """(tokens [S], whether no token outside the candidates could have been kept [S])."""
    vocab_size, params = scores_SY.shape[1], [draw.params for draw in draws]
    scores_SC, ids_SC = scores_SY.topk(min(vocab_size, NUM_CANDIDATES), dim=1)
    is_all = scores_SC.shape[1] == vocab_size
    has_k = [0 < each.top_k < vocab_size for each in params]
    last = [min(each.top_k, scores_SC.shape[1]) - 1 if has else 0 for each, has in zip(params, has_k, strict=True)]
    at_k_S = scores_SC.gather(1, _numbers(last, scores_SY, torch.long)[:, None])[:, 0]
    floor_S = torch.where(_numbers(has_k, scores_SY, torch.bool), at_k_S, -torch.inf)
    log_p = [math.log(each.min_p) if each.min_p > 0 else -math.inf for each in params]
    floor_S = torch.maximum(floor_S, _numbers(log_p, scores_SY, torch.float32))
    is_whole_S = (scores_SC[:, -1] < floor_S) | is_all  # all that top_k and min_p keep is among the candidates
    weights_SC = scores_SC.double().exp() * (scores_SC >= floor_S[:, None])
    mass_SC = weights_SC.cumsum(1)
    top_p_S = _numbers([each.top_p for each in params], scores_SY, torch.float64)
    total_S, is_enough_S = mass_SC[:, -1], is_whole_S
    only_p = [not has and each.min_p == 0 for each, has in zip(params, has_k, strict=True)]
    if any(only_p):
        # As on the host: of the whole row, whose tail may lie outside.
        only_S = _numbers(only_p, scores_SY, torch.bool)
        total_S = torch.where(only_S, _block_sums(scores_SY.exp()).sum(1), total_S)
        is_enough_S = torch.where(only_S, mass_SC[:, -1] > top_p_S * total_S * (1 + 1e-6), is_enough_S) | is_all
    count_S = (mass_SC < (top_p_S * total_S)[:, None]).sum(1)
    num_kept_S = (weights_SC > 0).sum(1)
    at_p_S = scores_SC.gather(1, torch.minimum(count_S, num_kept_S - 1).clamp(min=0)[:, None])[:, 0]
    floor_S = torch.where(top_p_S < 1, torch.maximum(floor_S, at_p_S), floor_S)
    is_sure_S = is_enough_S & ((scores_SC[:, -1] < floor_S) | is_all)
    # In the order of the vocabulary.
    ids_SC, order_SC = ids_SC.sort(1)
    ends_SC = (weights_SC * (scores_SC >= floor_S[:, None])).gather(1, order_SC).cumsum(1)
    target_S1 = ends_SC[:, -1:] * _numbers([draw.number for draw in draws], scores_SY, torch.float64)[:, None]
    return ids_SC.gather(1, _first_above(ends_SC, target_S1))[:, 0], is_sure_S


def _draw_of_all(scores_SY: Tensor, draws: Sequence[RowDraw]) -> tuple[Tensor, Tensor]:
    """The same without filters: first the block of the vocabulary, then the token in it."""
    weights_SY = scores_SY.exp()
    ends_SB = _block_sums(weights_SY).cumsum(1)
    target_S1 = ends_SB[:, -1:] * _numbers([draw.number for draw in draws], scores_SY, torch.float64)[:, None]
    block_S1 = _first_above(ends_SB, target_S1)
    before_S1 = torch.where(block_S1 > 0, ends_SB.gather(1, (block_S1 - 1).clamp(min=0)), 0.0)
    places_SC = block_S1 * _BLOCK + torch.arange(_BLOCK, device=scores_SY.device)
    is_there_SC = places_SC < scores_SY.shape[1]
    inside_SC = weights_SY.gather(1, places_SC.clamp(max=scores_SY.shape[1] - 1)).double() * is_there_SC
    inside_SC = inside_SC.cumsum(1)
    # Sums in another order may fall short of the target by a rounding: then it is the last token with any weight.
    least_S1 = torch.nextafter(inside_SC[:, -1:], torch.zeros_like(inside_SC[:, -1:]))
    place_S1 = _first_above(inside_SC, torch.minimum(target_S1 - before_S1, least_S1))
    token_S = (block_S1 * _BLOCK + place_S1)[:, 0]
    return token_S, torch.ones_like(token_S, dtype=torch.bool)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """[S, 1]: of each row the first place whose end is above the target."""
    return (ends <= target).sum(1, keepdim=True).clamp(max=ends.shape[1] - 1)


def _block_sums(weights_SY: Tensor) -> Tensor:
    """fp64 [S, B]"""
    rest = -weights_SY.shape[1] % _BLOCK
    padded_SY = torch.nn.functional.pad(weights_SY, (0, rest)) if rest else weights_SY
    return padded_SY.unflatten(1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)


def _logprobs(logits_SY: Tensor, drawn_S: Tensor, count: int) -> tuple[Tensor, ...]:
    """Drawn tokens and their logits, normalisers, and of the `count` likeliest tokens ids and logits [S, K], of equal
    ones the lower id first; then the lowest logit of all that were looked at [S], -inf where that were all."""
    vocab_size = logits_SY.shape[1]
    best_S1 = logits_SY.max(1, keepdim=True).values
    offset_S = best_S1[:, 0].double() + (logits_SY - best_S1).exp().sum(1, dtype=torch.float64).log()
    logit_S = logits_SY.gather(1, drawn_S[:, None])[:, 0]
    seen = min(vocab_size, max(NUM_CANDIDATES, count + 1))
    values_SC, ids_SC = logits_SY.topk(seen, dim=1)
    last_S = values_SC[:, -1] if seen < vocab_size else torch.full_like(logit_S, -torch.inf)
    ids_SC, order_SC = ids_SC.sort(1)
    values_SC, order_SC = values_SC.gather(1, order_SC).sort(dim=1, descending=True, stable=True)
    shown = min(count, seen)
    return drawn_S, logit_S, offset_S, ids_SC.gather(1, order_SC)[:, :shown], values_SC[:, :shown], last_S
