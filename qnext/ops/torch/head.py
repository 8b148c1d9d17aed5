"""Cross entropy of the head, by chunks of rows. Legend: R rows, D hidden, Y vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 20


def rows_of_logits(vocab_size: int) -> int:
    """How many rows have about a million logits."""
    return max(64, _CHUNK_LOGITS // vocab_size)


def cross_entropy_sum(hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, *, chunk_rows: int = 0) -> Tensor:
    """See ops.cross_entropy_sum. By itself it takes about a million logits, which it holds four times."""
    return _CrossEntropySum.apply(hidden_RD, weight_YD, labels_R, chunk_rows or rows_of_logits(len(weight_YD)))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, chunk_rows: int) -> Tensor:
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_YD, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_RD.device)
        head_dtype, weight_YD = weight_YD.dtype, weight_YD.to(hidden_RD.dtype)  # a frozen head may be narrower
        for start in range(0, len(labels_R), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden, labels = hidden_RD[rows], labels_R[rows]
            is_valid = labels >= 0
            targets = labels.clamp_min(0)[:, None]
            log_probs = (hidden @ weight_YD.t()).to(wide).log_softmax(-1)
            total -= log_probs.gather(1, targets).squeeze(1).masked_fill(~is_valid, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=wide))
            grad_logits.mul_(is_valid[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_YD
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden
        ctx.grad_hidden, ctx.grad_weight, ctx.weight_dtype = grad_hidden, grad_weight, head_dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
