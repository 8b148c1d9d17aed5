"""Short causal convolution. Legend: T tokens, N sequences, C channels, W width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qnext.ops.packing import Packing
from qnext.ops.records import ConvOutput


def causal_conv1d_silu(
    x_TC: Tensor, weight_CW: Tensor, *, packing: Packing, initial_state_NWC: Tensor | None = None
) -> ConvOutput:
    """y_t = silu(sum_j w[:, j] * x_{t - W + 1 + j}), depthwise. To the left of a sequence is its initial state, or
    zeros."""
    if initial_state_NWC is None:
        initial_state_NWC = x_TC.new_zeros(packing.num_sequences, weight_CW.shape[1] - 1, x_TC.shape[1])
    parts = [
        convolve(x, weight_CW, left) for x, left in zip(x_TC.split(packing.lengths), initial_state_NWC, strict=True)
    ]
    return ConvOutput(torch.cat([y for y, _ in parts]), torch.stack([left for _, left in parts]))


def convolve(x_TC: Tensor, weight_CW: Tensor, left_WC: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of one sequence, and what is left of its next token: the last W - 1 inputs, oldest first."""
    num_tokens, weight_CW = len(x_TC), weight_CW.to(x_TC.dtype)
    inputs = torch.cat([left_WC.to(x_TC.dtype), x_TC])
    y_TC = sum(weight_CW[:, j] * inputs[j : j + num_tokens] for j in range(weight_CW.shape[1]))
    return silu(torch.as_tensor(y_TC)), inputs[num_tokens:]
