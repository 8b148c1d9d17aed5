"""Short causal convolution. Legend: T tokens, N sequences, C channels, W width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.records import ConvOutput

_BLOCK_ROWS = 512


def causal_conv1d_silu(
    x_TC: Tensor, weight_CW: Tensor, *, packing: Packing, initial_state_NWC: Tensor | None = None
) -> ConvOutput:
    """silu of a depthwise causal convolution: y_t = silu(sum_j w[:, j] * x_{t - W + 1 + j}).

    To the left of each sequence is its initial state, or zeros. Sequences never see each other.
    """
    history = weight_CW.shape[1] - 1
    rows_T, history_rows_NW = packing.extended_rows(history)
    x_extended = x_TC.new_zeros(packing.num_tokens + packing.num_sequences * history, x_TC.shape[1])
    x_extended = x_extended.index_copy(0, rows_T, x_TC)
    if initial_state_NWC is not None:
        x_extended = x_extended.index_copy(0, history_rows_NW.flatten(), initial_state_NWC.flatten(0, 1).to(x_TC.dtype))
    y_extended = _DepthwiseSilu.apply(x_extended, weight_CW)
    last_rows = packing.lengths_N[:, None] + history_rows_NW
    state = x_extended.index_select(0, last_rows.flatten()).view(*last_rows.shape, x_TC.shape[1])
    return ConvOutput(y_extended.index_select(0, rows_T - history), state)


class _DepthwiseSilu(torch.autograd.Function):
    """Valid depthwise convolution along dim 0 followed by silu: [T + W - 1, C] -> [T, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CW: Tensor) -> Tensor:
        width = weight_CW.shape[1]
        num_out = x.shape[0] - width + 1
        weight = weight_CW.to(x.dtype).t().contiguous()
        y = x[:num_out] * weight[0]
        for j in range(1, width):
            y.addcmul_(x[j : j + num_out], weight[j])
        ctx.save_for_backward(x, weight_CW, y)
        return torch.nn.functional.silu(y)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_CW, y = ctx.saved_tensors
        width, num_out = weight_CW.shape[1], y.shape[0]
        grad_y = torch.ops.aten.silu_backward(grad_out, y)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = weight_CW.to(x.dtype).t().contiguous()
            grad_x = torch.zeros_like(x)
            for j in range(width):
                grad_x[j : j + num_out].addcmul_(grad_y, weight[j])
        if ctx.needs_input_grad[1]:
            grad_weight = _tap_sums(x, grad_y, width).t().to(weight_CW.dtype)
        return grad_x, grad_weight


def _tap_sums(x: Tensor, grad_y: Tensor, width: int) -> Tensor:
    """[W, C]: sum over t of x[t + j] * grad_y[t] for each tap j. In blocks, so that products stay in the cache."""
    num_out, channels = grad_y.shape
    total = x.new_zeros(width, channels)
    for start in range(0, num_out, _BLOCK_ROWS):
        block = grad_y[start : start + _BLOCK_ROWS]
        shape = (width, len(block), channels)
        windows = x.as_strided(shape, (channels, channels, 1), x.storage_offset() + start * channels)
        total += (windows * block).sum(1)
    return total
