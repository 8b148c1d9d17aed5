"""RMSNorm with its gradient, each one native pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.cpu.kernels import kernels


class _NormOptions(NamedTuple):
    eps: float
    zero_centered: bool


def trained_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm."""
    return _NormFunction.apply(x, weight_D, _NormOptions(eps, zero_centered))


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, options: _NormOptions) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        inverse, out = x.new_empty(x.shape[:-1]), torch.empty_like(x)
        kernels().norm_training_forward(_arguments(x, weight_D, inverse, options), out.data_ptr())
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_x = torch.empty_like(x)
        partial = x.new_empty(-(-inverse.numel() // kernels().norm_training_rows()), x.shape[-1])
        call = _arguments(x, weight_D, inverse, ctx.options)
        kernels().norm_training_backward(call, grad_out.data_ptr(), grad_x.data_ptr(), partial.data_ptr())
        return grad_x, partial.sum(0), None


def _arguments(x: Tensor, weight_D: Tensor, inverse: Tensor, options: _NormOptions) -> Any:
    return kernels().NormTraining(
        num_rows=inverse.numel(),
        size=x.shape[-1],
        eps=options.eps,
        zero_centered=options.zero_centered,
        x=x.data_ptr(),
        weight=weight_D.data_ptr(),
        inverse=inverse.data_ptr(),
    )
