"""RMSNorm of rows by GPU kernels. Legend: T tokens, D the normalised dim."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.checks import check_norm
from qnext.ops.triton.train_rows import MAX_ROW, NormForm, normed, trained_rms_norm
from qnext.ops.triton.trust import compared, is_trusted, numbers, take, train, wants_gradients


def serves_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> bool:
    """Whether a program can hold a row."""
    if not 0 < x.shape[-1] <= MAX_ROW or x.numel() == 0:
        return False
    if wants_gradients(x, weight_D):
        return train(x, weight_D) and is_trusted(try_rms_norm_gradient, x.device)
    return take(x, weight_D) and is_trusted(try_rms_norm, x.device)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm. Computed in fp32 and cast once."""
    check_norm(x, weight_D)
    if wants_gradients(x, weight_D):
        return trained_rms_norm(x, weight_D, eps=eps, zero_centered=zero_centered)
    return normed(x, weight_D, NormForm(eps, zero_centered))


def try_rms_norm(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(3, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        wanted = reference.rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered)
        yield rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered), wanted


def try_rms_norm_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(70, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        norm: dict[str, Any] = {"eps": 1e-6, "zero_centered": zero_centered}
        yield from compared(partial(rms_norm, **norm), partial(reference.rms_norm, **norm), x_TD, weight_D)
