"""Norms. Legend: ... any leading dims, D the normalised dim."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.checks import check_norm


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times (1 + weight) where `zero_centered`, times weight otherwise.

    Computed in fp32 (fp64 for fp64 input) and cast once, at the end. Qwen3-Next uses the zero-centred form for every
    norm but the one inside Gated DeltaNet; Qwen3 uses the plain form throughout.
    """
    check_norm(x, weight_D)
    return _RMSNormFunction.apply(x, weight_D, None, eps, zero_centered)


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """weight * rms_norm(x) * silu(gate): normalise first, gate after. `gate` has the shape of `x`."""
    return _RMSNormFunction.apply(x, weight_D, gate, eps, False)


class _RMSNormFunction(torch.autograd.Function):
    """One function for both norms, so that backward keeps the input and one number per row, not every product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        mean_square = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = torch.rsqrt(mean_square.add_(eps))
        scale = weight.to(wide) + 1.0 if zero_centered else weight.to(wide)
        y = (x_wide * rstd).mul_(scale)
        if gate is not None:
            y.mul_(F.silu(gate.to(wide)))
        ctx.save_for_backward(x, weight, gate, rstd)
        ctx.zero_centered = zero_centered
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, rstd = ctx.saved_tensors
        wide, size = rstd.dtype, x.shape[-1]
        scale = weight.to(wide) + 1.0 if ctx.zero_centered else weight.to(wide)
        normed = x.to(wide) * rstd
        grad = grad_out.to(wide)
        grad_gate = None
        if gate is not None:
            gate_wide = gate.to(wide)
            if ctx.needs_input_grad[2]:
                grad_gate = torch.ops.aten.silu_backward((normed * scale).mul_(grad), gate_wide).to(gate.dtype)
            grad = grad * F.silu(gate_wide)
        product = grad * normed
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.view(-1, size).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # d x = rstd * (scale * grad - normed * mean(scale * grad * normed))
            projection = torch.matmul(product, scale).div_(-size)[..., None]
            grad_x = normed.mul_(projection).addcmul_(grad, scale).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, grad_gate, None, None


def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dim, in fp32 at least. The result keeps that width.

    A row of zeros gives zero, with the gradient zero and not the slope 1 / sqrt(eps) of the formula: masked padding
    would multiply gradients by a thousand in every layer.
    """
    return _L2NormFunction.apply(x, eps)


class _L2NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sum_squares = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_()
        inverse = torch.rsqrt(sum_squares + eps)
        y = x_wide * inverse
        ctx.save_for_backward(y, torch.where(sum_squares > 0, inverse, 0.0))
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        projection = torch.linalg.vecdot(grad_out, y).neg_()[..., None]
        return torch.addcmul(grad_out, y, projection).mul_(inverse).to(ctx.dtype), None
