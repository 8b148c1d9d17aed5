"""Logits to tokens. A request's tokens depend on its own logits, parameters and seed only.

docs/architecture.md ("How a token is chosen") tells the order of operations, and why drafts change nothing. A row that
is not finite, and whatever raises while a request's tokens are chosen, is that request's failure alone.

Legend: R rows, Y vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.policy.request import Guide, Request, SampledToken
from qnext.engine.sampling.filters import Row, draw
from qnext.engine.sampling.logprobs import not_finite, with_logprobs
from qnext.engine.sampling.on_device import RowChoice, RowDraw, choose
from qnext.engine.sampling.seeds import uniform
from qnext.engine.sampling.watermark import Mark
from qnext.errors import QnextError, RequestBroke, UsageError, is_fault

_log = logging.getLogger("qnext.engine")
_LARGEST = np.finfo(np.float32).max


class Window(NamedTuple):
    """The rows of one request: one for its last known token and one for each drafted token after it."""

    request: Request
    draft_ids: tuple[int, ...] = ()
    guide: Guide | None = None


class Verdict(NamedTuple):
    """The tokens that a window brought, in order: drafted ones that were right, then one more unless the request ends.

    As many rows of the window as there are tokens were computed for the right input. A request with a `failure` cannot
    go on after them; without one there is at least one token.
    """

    tokens: tuple[SampledToken, ...]
    failure: QnextError | None = None


def verify(logits_RY: Tensor, windows: Sequence[Window]) -> list[Verdict]:
    """Choose the tokens of every window; R is the rows of all windows, one after another, in fp32.

    Row i of a window is the draw number len(output_ids) + i of its request. A window ends with the first token that
    differs from the draft, ends the answer or reaches its limit. Requests are not changed, guides are.
    A window fails with NotFinite at a row that holds NaN or no finite maximum, before its guide is asked.
    """
    assert logits_RY.shape[0] == sum(len(window.draft_ids) + 1 for window in windows)
    if not windows:
        return []
    rows_RY = _on_host(logits_RY)
    choices = _choices(rows_RY, lambda: [draw for window in windows for draw in _draws_of(window)])
    verdicts, first = [], 0
    for window in windows:
        end = first + len(window.draft_ids) + 1
        verdicts.append(_verified(rows_RY[first:end], choices[first:end], window))
        first = end
    return verdicts


def _draws_of(window: Window) -> Iterator[RowDraw | None]:
    """How the rows of a window are drawn. Earlier tokens of the window would change only those that have none."""
    start = len(window.request.output_ids)
    for index in range(start, start + len(window.draft_ids) + 1):
        yield None if window.guide is not None else _draw_of(window.request, index)


def _draw_of(request: Request, index: int) -> RowDraw | None:
    """None where logits are changed before a token is drawn, which the host does."""
    if request.marks is not None or _is_adjusted(request, index):
        return None
    return RowDraw(request.params, 0.0 if request.params.is_greedy else uniform(request.seed, index))


def _choices(rows_RY: Tensor | Row, draws: Callable[[], Sequence[RowDraw | None]]) -> list[RowChoice]:
    """Of every row the likeliest token (the lowest id of equal ones) and whether the row is finite; on a device also
    the tokens that are drawn there, as `draws` says.

    The maximum of a row is NaN where any entry is, so one number per row is enough to look at.
    """
    if isinstance(rows_RY, Tensor):
        return choose(rows_RY, draws())
    best_ids = rows_RY.argmax(axis=-1).tolist()  # of a row with NaN: where the first is
    return [RowChoice(best, math.isfinite(row_Y[best]), None) for row_Y, best in zip(rows_RY, best_ids, strict=True)]


def draft(
    logits_RY: Tensor,
    requests: Sequence[Request],
    indices: Sequence[int],
    drafted: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """A guess for each row of draft logits: what `requests[r]` would choose from it as output token `indices[r]`, after
    the tokens `drafted[r]` behind those that it has.

    It uses the number that `verify` will use there, so that alike distributions choose the same token. Counts of the
    penalties are those of the tokens known now; constraints are not asked. Of a row that is not finite, or whose
    request breaks, it is any token: drafts are guesses, and `verify` finds what is wrong.
    """
    assert logits_RY.shape[0] == len(requests) == len(indices)
    if not requests:
        return []
    rows_RY = _on_host(logits_RY)
    choices = _choices(rows_RY, lambda: list(map(_draw_of, requests, indices)))
    guesses = [choice.best_id if choice.token is None else choice.token.token_id for choice in choices]
    for r, (request, index) in enumerate(zip(requests, indices, strict=True)):
        marks, more = request.marks, () if drafted is None else tuple(drafted[r])
        if choices[r].token is not None or not choices[r].is_finite:
            continue
        if request.params.is_greedy and marks is None and not _is_adjusted(request, index):
            continue
        try:
            row_Y = _numpy(rows_RY[r])
            if _is_adjusted(request, index):
                row_Y = _adjusted(row_Y, request, index, request.output_counts, None)
            if row_Y.max() > -np.inf:
                mark = (
                    None
                    if marks is None
                    else Mark.guess(marks, request.output_ids[max(0, index - marks.key.context) : index], more)
                )
                guesses[r] = _choose(row_Y, request, index, mark)
        except Exception:
            _log.exception("request %s: no draft can be chosen", request.id)
    return guesses


def _verified(logits_RY: Tensor | Row, choices: Sequence[RowChoice], window: Window) -> Verdict:
    request, guide = window.request, window.guide
    start = len(request.output_ids)
    counts: Mapping[int, int] = request.output_counts
    tokens: list[SampledToken] = []
    for i, (best_id, is_finite, chosen) in enumerate(choices):
        if not is_finite:
            return Verdict(tuple(tokens), not_finite())
        try:
            more = tuple(token.token_id for token in tokens)
            token = chosen or _token(logits_RY[i], best_id, window, start + i, counts, more)
            if guide is not None:
                guide.accept(token.token_id)
        except QnextError as failure:
            return Verdict(tuple(tokens), failure)
        except BaseException as error:  # a panic of a library's is no Exception
            if not is_fault(error):
                raise
            _log.exception("request %s: no token can be chosen", request.id)
            return Verdict(tuple(tokens), RequestBroke.of(error, "choosing a token"))
        tokens.append(token)
        if i == len(window.draft_ids) or token.token_id != window.draft_ids[i]:
            break
        if request.end_reason(token.token_id, start + i + 1) is not None:
            break
        if request.params.has_penalties:
            counts = Counter(counts)
            counts[token.token_id] += 1
    return Verdict(tuple(tokens))


def _token(
    logits_Y: Tensor | Row,
    best_id: int,
    window: Window,
    index: int,
    counts: Mapping[int, int],
    more: tuple[int, ...],
) -> SampledToken:
    """Token `index` of the output, given the `counts` of those before it. `more` are those that the request has not
    yet."""
    request = window.request
    words = None if window.guide is None else window.guide.allowed()
    if words is None and request.params.takes_likeliest and index >= request.params.min_tokens:
        return SampledToken(best_id)
    is_adjusted = words is not None or _is_adjusted(request, index)
    num_top = request.params.logprobs
    raw_Y = _numpy(logits_Y)
    token_id = best_id
    if is_adjusted:
        row_Y = _adjusted(raw_Y, request, index, counts, words)
        token_id = int(row_Y.argmax())
        if row_Y[token_id] == -np.inf:
            raise UsageError(_nothing_left(window, index))
    else:
        row_Y = raw_Y
    mark = None if request.marks is None else Mark.at(request.marks, request.output_ids, more)
    if mark is not None or not request.params.is_greedy:
        token_id = _choose(row_Y, request, index, mark)
    return SampledToken(token_id) if num_top is None else with_logprobs(raw_Y, token_id, num_top)


def _nothing_left(window: Window, index: int) -> str:
    """What leaves no token, by the names of the parameters."""
    params = window.request.params
    rules = {
        "the constraint": window.guide is not None,
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.banned_token_ids),
        "min_tokens": index < params.min_tokens,
    }
    names = " and ".join(name for name, is_set in rules.items() if is_set) or "the model"
    return f"no token may be chosen as token {index} of the answer: {names} left none"


def _choose(row_Y: Row, request: Request, index: int, mark: Mark | None) -> int:
    if mark is not None:
        row_Y = mark.with_green_list(row_Y)
    if request.params.is_greedy:
        return int(row_Y.argmax())
    tilt = None if mark is None else mark.tilt
    return draw(row_Y, request.params, uniform(request.seed, index), tilt)


def _on_host(logits_RY: Tensor) -> Tensor | Row:
    """The same as an array where that costs nothing. Elsewhere tokens are drawn on the device (`on_device.py`), which
    only rows leave that need the host."""
    return logits_RY.numpy() if logits_RY.device.type == "cpu" else logits_RY


def _numpy(row_Y: Tensor | Row) -> Row:
    return row_Y.numpy(force=True) if isinstance(row_Y, Tensor) else row_Y


def _is_adjusted(request: Request, index: int) -> bool:
    params = request.params
    return (
        params.has_penalties
        or bool(params.logit_bias)
        or bool(params.banned_token_ids)
        or params.allowed_token_ids is not None
        or index < params.min_tokens
    )


def _adjusted(
    row_Y: Row, request: Request, index: int, counts: Mapping[int, int], words: NDArray[np.int32] | None
) -> Row:
    """A copy of the row with everything up to the penalties applied."""
    params, vocab_size = request.params, len(row_Y)
    if params.allowed_token_ids is None:
        adjusted_Y = row_Y.copy()
    else:
        ids = list(params.allowed_token_ids)
        adjusted_Y = np.full_like(row_Y, -np.inf)
        adjusted_Y[ids] = row_Y[ids]
    if words is not None:
        assert len(words) == -(-vocab_size // 32), "the mask is not as long as the vocabulary"
        words = np.ascontiguousarray(words, dtype="<i4")
        is_allowed_Y = np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(bool)
        np.putmask(adjusted_Y, ~is_allowed_Y, -np.inf)
    adjusted_Y[list(params.banned_token_ids)] = -np.inf
    if index < params.min_tokens:
        adjusted_Y[[token for token in request.stop_ids if 0 <= token < vocab_size]] = -np.inf
    if params.logit_bias:
        adjusted_Y[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    if params.has_penalties:
        _penalize(adjusted_Y, request, counts)
    return adjusted_Y


def _penalize(row_Y: Row, request: Request, counts: Mapping[int, int]) -> None:
    params = request.params
    tokens = np.fromiter(counts, dtype=np.intp, count=len(counts))
    if params.repetition_penalty != 1:
        seen = np.union1d(request.prompt_tokens, tokens)
        values = row_Y[seen]
        factor = np.float32(params.repetition_penalty)
        with np.errstate(over="ignore"):
            penalized = np.where(values > 0, values / factor, values * factor)
        # No finite logit becomes infinite, and none that is forbidden finite.
        row_Y[seen] = np.where(np.isfinite(values), penalized.clip(-_LARGEST, _LARGEST), values)
    if params.presence_penalty or params.frequency_penalty:
        times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
        row_Y[tokens] -= np.float32(params.frequency_penalty) * times + np.float32(params.presence_penalty)
