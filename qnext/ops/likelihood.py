"""Log-probabilities of raw logits: one formula for the engine that draws tokens and for the trainer that scores them.

Legend: R rows, Y vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def log_normalizer(row_Y: NDArray[Any]) -> float:
    """log sum exp of a row, in fp64: a log-probability is a logit less this."""
    best = row_Y.max()
    with np.errstate(over="ignore"):  # of logits farther apart than fp32 reaches: no weight at all
        return float(best) + float(np.log(np.exp(row_Y - best).sum(dtype=np.float64)))


def token_log_probs(logits_RY: Tensor, token_ids_R: Tensor) -> Tensor:
    """[R] fp64: the log-probability of each row's token, with the bits that the engine tells, and a gradient."""
    log_probs_R: Tensor = _TokenLogProbs.apply(logits_RY, token_ids_R)
    return log_probs_R


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RY: Tensor, token_ids_R: Tensor) -> Tensor:
        ctx.save_for_backward(logits_RY, token_ids_R)
        rows_RY = logits_RY.to(torch.promote_types(logits_RY.dtype, torch.float32)).numpy(force=True)
        offsets_R = torch.tensor([log_normalizer(row_Y) for row_Y in rows_RY], dtype=torch.float64)
        return logits_RY.gather(1, token_ids_R[:, None])[:, 0].double() - offsets_R.to(logits_RY.device)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None]:
        logits_RY, token_ids_R = ctx.saved_tensors
        grad_R1 = grad_R.to(logits_RY.dtype)[:, None]
        grad_RY = logits_RY.softmax(-1).mul_(-grad_R1)
        return grad_RY.scatter_add_(1, token_ids_R[:, None], grad_R1), None
