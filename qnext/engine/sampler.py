"""Logits to tokens. What a request gets depends on its own logits, parameters and seed only, never on its company.

Order of operations, that of vLLM: log-probabilities are read off the raw logits; then repetition, frequency and
presence penalties; temperature; min_p; top_k; top_p; one draw.

Legend: R rows, Y vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.engine.request import Request, SampledToken, SamplingParams
from qnext.errors import CorruptCheckpoint

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@torch.inference_mode()
def sample(logits_RY: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """One token for each row of fp32 logits.

    Raises CorruptCheckpoint when a row holds NaN. Row r is the draw number len(output_ids) of requests[r].
    """
    assert logits_RY.shape[0] == len(requests)
    if not requests:
        return []
    _check_finite(logits_RY)
    params = [request.params for request in requests]
    adjusted_RY = _penalized(logits_RY, requests) if any(p.has_penalties for p in params) else logits_RY
    token_ids: list[int] = adjusted_RY.argmax(dim=-1).tolist()
    random_rows = [row for row, p in enumerate(params) if not p.is_greedy]
    if random_rows:
        scores = adjusted_RY if len(random_rows) == len(params) else adjusted_RY[random_rows]
        uniforms = [uniform(requests[row].seed, len(requests[row].output_ids)) for row in random_rows]
        drawn = _draw(filtered(scores, [params[row] for row in random_rows]), uniforms)
        for row, token_id in zip(random_rows, drawn, strict=True):
            token_ids[row] = token_id
    return _with_logprobs(logits_RY, params, token_ids)


def uniform(seed: int, index: int) -> float:
    """Number `index` of the stream `seed`, in [0, 1 - 2^-48]: SplitMix64 (Steele, Lea and Flood, 2014) as a function.

    A counter instead of a generator's state: a request that is run again from the middle draws the same numbers.
    """
    return (_mix(_mix(seed & _MASK) + index * _GOLDEN & _MASK) >> 16) * 2.0**-48


def _mix(value: int) -> int:
    value = value + _GOLDEN & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def filtered(scores_RY: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature-scaled scores with everything that min_p, top_k and top_p exclude at -inf, maximum 0 per row.

    Each filter keeps what is at least as likely as a threshold, so ties at the border are kept whatever the order in
    which a sort leaves them.
    """
    device = scores_RY.device

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # With the maximum at 0 no temperature, however small, overflows.
    scores_RY = (scores_RY - scores_RY.amax(dim=-1, keepdim=True)) / column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        floor = column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])
        scores_RY = scores_RY.masked_fill(scores_RY < floor, -math.inf)
    vocab_size = scores_RY.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    rows = [row for row, k in enumerate(top_k) if k < vocab_size]
    if rows:
        best = scores_RY[rows].topk(max(top_k[row] for row in rows)).values
        last = torch.tensor([top_k[row] - 1 for row in rows], device=device)
        scores_RY = _cut(scores_RY, rows, best.gather(1, last[:, None]))
    rows = [row for row, p in enumerate(params) if p.top_p < 1]
    if rows:
        best = scores_RY[rows]
        width = int((best > -math.inf).sum(dim=-1).max())
        best = best.topk(width).values
        before = best.to(torch.float64).softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0.0
        kept = (before < column([params[row].top_p for row in rows])).sum(dim=-1, keepdim=True)
        scores_RY = _cut(scores_RY, rows, best.gather(1, kept - 1))
    return scores_RY


def _cut(scores_RY: Tensor, rows: list[int], threshold: Tensor) -> Tensor:
    """The scores with everything below the rows' thresholds at -inf."""
    floor = scores_RY.new_full((scores_RY.shape[0], 1), -math.inf)
    floor[rows] = threshold
    return scores_RY.masked_fill(scores_RY < floor, -math.inf)


def _draw(scores_RY: Tensor, uniforms: list[float]) -> list[int]:
    """Invert the cumulative distribution in the order of the vocabulary."""
    cumulative = scores_RY.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = torch.tensor(uniforms, dtype=torch.float64, device=scores_RY.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).tolist()


def _penalized(logits_RY: Tensor, requests: Sequence[Request]) -> Tensor:
    logits_RY = logits_RY.clone()
    for row, request in zip(logits_RY, requests, strict=True):
        params = request.params
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(request.prompt_id_set.union(request.output_counts)), device=row.device)
            values = row[seen]
            factor = params.repetition_penalty
            row[seen] = torch.where(values > 0, values / factor, values * factor)
        if request.output_counts and (params.presence_penalty or params.frequency_penalty):
            tokens = torch.tensor(list(request.output_counts), device=row.device)
            counts = torch.tensor(list(request.output_counts.values()), dtype=torch.float32, device=row.device)
            row[tokens] -= params.frequency_penalty * counts + params.presence_penalty
    return logits_RY


def _with_logprobs(logits_RY: Tensor, params: Sequence[SamplingParams], token_ids: list[int]) -> list[SampledToken]:
    tokens = [SampledToken(token_id) for token_id in token_ids]
    for row, p in enumerate(params):
        if p.logprobs is None:
            continue
        logprobs_Y = logits_RY[row].log_softmax(dim=-1)
        top: tuple[tuple[int, float], ...] = ()
        if p.logprobs:
            values, ids = logprobs_Y.topk(min(p.logprobs, len(logprobs_Y)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        tokens[row] = SampledToken(token_ids[row], float(logprobs_Y[token_ids[row]]), top)
    return tokens


def _check_finite(logits_RY: Tensor) -> None:
    # The maximum is NaN where any entry is, so one number per row is enough to look at.
    highest = logits_RY.amax(dim=-1)
    if not bool(torch.isfinite(highest).all()):
        raise CorruptCheckpoint("the model's logits are not finite: weights are damaged or overflow in this dtype")
