"""Matrix products with weights. Legend: T rows, D inputs, F outputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.checks import check_linear
from qnext.ops.weights import Weight, dequantize

_MIN_WIDENED_ROWS = 16  # below, widening the weight costs more than it saves
_BLOCK_OUTPUTS = 1024  # outputs that are widened at a time: a few MB of scratch


def linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x.

    For bf16 without gradients on the CPU, one row goes through torch's matrix-vector product, which reads weights half
    again as fast as its matrix product. On a CPU without bf16 arithmetic many rows are multiplied in fp32, with the
    weight widened block by block. torch would emulate bf16 there, three times slower and no more exact.
    """
    check_linear(x_TD, weight_FD)
    is_other = not isinstance(weight_FD, Tensor) or weight_FD.dtype != x_TD.dtype
    if torch.is_grad_enabled() and is_other and is_frozen(weight_FD):
        y_TF = _FrozenLinear.apply(x_TD, weight_FD)
        return y_TF if bias_F is None else y_TF + bias_F
    if not isinstance(weight_FD, Tensor) or not torch.is_grad_enabled():
        weight_FD = dequantize(weight_FD, x_TD.dtype)
    if bias_F is None and is_bf16_inference(x_TD, weight_FD):
        if x_TD.shape[0] == 1:
            return torch.mv(weight_FD, x_TD[0])[None]
        if x_TD.shape[0] >= _MIN_WIDENED_ROWS and not has_native_bf16():
            return _widened_linear(x_TD, weight_FD)
    return F.linear(x_TD, weight_FD, bias_F)


def is_frozen(weight: Tensor | Weight) -> bool:
    """Whether a weight gets no gradient, although one is wanted elsewhere."""
    return not isinstance(weight, Tensor) or not weight.requires_grad


class _FrozenLinear(torch.autograd.Function):
    """x W^T with a gradient for x alone. The backward pass computes the numbers of W again, and keeps none."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor | Weight) -> Tensor:
        ctx.weight, ctx.dtype = weight, x_TD.dtype
        return F.linear(x_TD, dequantize(weight, x_TD.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ dequantize(ctx.weight, grad.dtype)).to(ctx.dtype), None


def _widened_linear(x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    x_wide = x_TD.float()
    num_outputs = weight_FD.shape[0]
    out = x_TD.new_empty(x_TD.shape[0], num_outputs)
    scratch = torch.empty(min(_BLOCK_OUTPUTS, num_outputs), weight_FD.shape[1])
    for start in range(0, num_outputs, _BLOCK_OUTPUTS):
        rows = slice(start, min(start + _BLOCK_OUTPUTS, num_outputs))
        out[:, rows] = x_wide @ scratch[: rows.stop - rows.start].copy_(weight_FD[rows]).t()
    return out


def is_bf16_inference(x_TD: Tensor, *weights: Tensor) -> bool:
    """Whether rows and weights are bf16 on the CPU, and no gradients are wanted."""
    tensors = (x_TD, *weights)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    is_bf16 = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
    return is_bf16 and not needs_grad and x_TD.dim() == 2


@cache
def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware. Only x86 without AVX-512 BF16 and AMX is known not to."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
