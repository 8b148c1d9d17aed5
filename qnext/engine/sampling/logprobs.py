"""Log-probabilities of raw logits: of one row, and of the tokens of a prompt. Y vocabulary, T tokens, D hidden."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from qnext.engine.policy.request import SampledToken
from qnext.engine.policy.step import PromptScores
from qnext.engine.sampling.filters import Row, floor_of_most_likely
from qnext.errors import NotFinite
from qnext.ops import log_normalizer

_ROWS_AT_ONCE = 128  # 78 MB of logits with a vocabulary of 151,936


def with_logprobs(row_Y: Row, token_id: int, num_top: int) -> SampledToken:
    """The token with its log-probability and the `num_top` most likely ones; of equal ones the lower id comes first."""
    offset = log_normalizer(row_Y)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        num_top = min(num_top, len(row_Y))
        ids = np.flatnonzero(row_Y >= floor_of_most_likely(row_Y, num_top))
        ids = ids[np.argsort(-row_Y[ids], kind="stable")[:num_top]]
        top = tuple((int(other), float(row_Y[other]) - offset) for other in ids)
    return SampledToken(token_id, float(row_Y[token_id]) - offset, top)


def prompt_logprobs(logits: Callable[[Tensor], Tensor], hidden_TD: Tensor, scores: PromptScores) -> list[SampledToken]:
    """The tokens of a prompt that the hidden rows of a chunk tell, with their log-probabilities and ranks.

    `logits` maps rows [T, D] to [T, Y]. Raises NotFinite for logits that are no finite numbers.
    """
    found: list[SampledToken] = []
    for begin in range(0, len(scores.targets), _ROWS_AT_ONCE):
        targets = scores.targets[begin : begin + _ROWS_AT_ONCE]
        row = scores.first_row + begin
        logits_TY = logits(hidden_TD[row : row + len(targets)]).float().numpy(force=True)
        if not np.isfinite(logits_TY.max(axis=-1)).all():  # NaN where any entry of a row is
            raise not_finite()
        found += [
            with_logprobs(row_Y, token, scores.num_top)._replace(rank=int((row_Y > row_Y[token]).sum()) + 1)
            for row_Y, token in zip(logits_TY, targets, strict=True)
        ]
    return found


def not_finite() -> NotFinite:
    return NotFinite("the model's logits are not finite: weights are damaged or overflow in this dtype")
