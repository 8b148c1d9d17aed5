"""Matrices to integer codes by native kernels. Legend: F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext.ops.cpu.kernels import check_memory, kernels, run_on
from qnext.ops.quantized import QuantizedWeight

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPS = (32, 64, 128)


def serves_round_to_groups(
    weight_FD: Tensor,
    importance_D: Tensor | None = None,
    *,
    divisors: Sequence[float],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
) -> bool:
    return _fits(weight_FD, group_size)


def serves_rounding_errors(weight_FD: Tensor, rounded: QuantizedWeight) -> bool:
    """Whether the codes are symmetric."""
    is_plain = rounded.zeros is None and rounded.codes.is_contiguous() and rounded.scales.is_contiguous()
    return is_plain and _fits(weight_FD, rounded.group_size)


def _fits(weight_FD: Tensor, group_size: int) -> bool:
    """Whether the kernels round this matrix, in groups of that size."""
    return (
        run_on(weight_FD.device)
        and weight_FD.dtype in _KINDS
        and weight_FD.dim() == 2
        and weight_FD.is_contiguous()
        and group_size in _GROUPS
        and weight_FD.shape[1] % group_size == 0
    )


def round_to_groups(
    weight_FD: Tensor,
    importance_D: Tensor | None = None,
    *,
    divisors: Sequence[float],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """See ops.round_to_groups."""
    num_outputs, num_inputs = weight_FD.shape
    codes = torch.empty((num_outputs, num_inputs * bits // 8), dtype=torch.uint8)
    scales = torch.empty((num_outputs, num_inputs // group_size), dtype=scale_dtype)
    rounded = QuantizedWeight(codes, scales, bits, group_size)
    divisors_N = torch.tensor(divisors, dtype=torch.float32)
    if importance_D is not None:
        importance_D = importance_D.contiguous()
        check_memory(importance_D, torch.float32, (num_inputs,))
    importance = 0 if importance_D is None else importance_D.data_ptr()
    kernels().round_matrix(_arguments(weight_FD, rounded), importance, divisors_N.data_ptr(), len(divisors_N))
    return rounded


def rounding_errors(weight_FD: Tensor, rounded: QuantizedWeight) -> Tensor:
    """See ops.rounding_errors."""
    squares_F2 = torch.empty((len(weight_FD), 2), dtype=torch.float64)
    kernels().rounding_errors(_arguments(weight_FD, rounded), squares_F2.data_ptr())
    return squares_F2


def _arguments(weight_FD: Tensor, rounded: QuantizedWeight) -> Any:
    check_memory(weight_FD, weight_FD.dtype, rounded.shape)
    check_memory(rounded.codes, torch.uint8)
    check_memory(rounded.scales, rounded.scales.dtype)
    return kernels().Rounding(
        weight_kind=_KINDS[weight_FD.dtype],
        scale_kind=_KINDS[rounded.scales.dtype],
        num_outputs=weight_FD.shape[0],
        num_inputs=weight_FD.shape[1],
        group_size=rounded.group_size,
        bits=rounded.bits,
        weight=weight_FD.data_ptr(),
        codes=rounded.codes.data_ptr(),
        scales=rounded.scales.data_ptr(),
    )
