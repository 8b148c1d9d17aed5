"""Norms, wide inside and cast once at the end. Legend: ... any leading dims, D the normalised dim."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qnext.ops.reference.width import wide


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times 1 + weight where `zero_centered`, times weight otherwise."""
    scale = wide(weight_D) + 1 if zero_centered else wide(weight_D)
    return (_normed(wide(x), eps) * scale).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """weight * norm(x) * silu(gate): normalise first, gate after."""
    return (_normed(wide(x), eps) * wide(weight_D) * silu(wide(gate))).to(x.dtype)


def _normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps), wide. A row of zeros has the gradient zero, not the formula's 1 / sqrt(eps)."""
    x = wide(x)
    squares = x.square().sum(-1, keepdim=True)
    return torch.where(squares > 0, x / (squares + eps).sqrt(), 0.0)
