"""Matrices to integer codes by native kernels. Legend: F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext.ops.quantized import QuantizedWeight

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPS = (32, 64, 128)


def fits_rounding(weight_FD: Tensor, *, group_size: int) -> bool:
    """Whether the kernels round this matrix, in groups of that size."""
    return (
        weight_FD.dtype in _KINDS
        and weight_FD.dim() == 2
        and weight_FD.is_contiguous()
        and group_size in _GROUPS
        and weight_FD.shape[1] % group_size == 0
    )


def round_to_groups(
    native: Any,
    weight_FD: Tensor,
    importance_D: Tensor | None,
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
        assert importance_D.shape == (num_inputs,) and importance_D.dtype == torch.float32
        importance_D = importance_D.contiguous()
    native.round_matrix(
        _arguments(native, weight_FD, rounded),
        0 if importance_D is None else importance_D.data_ptr(),
        divisors_N.data_ptr(),
        len(divisors_N),
    )
    return rounded


def rounding_errors(native: Any, weight_FD: Tensor, rounded: QuantizedWeight) -> Tensor:
    """See ops.rounding_errors."""
    assert rounded.codes.is_contiguous() and rounded.scales.is_contiguous() and rounded.zeros is None
    squares_F2 = torch.empty((len(weight_FD), 2), dtype=torch.float64)
    native.rounding_errors(_arguments(native, weight_FD, rounded), squares_F2.data_ptr())
    return squares_F2


def _arguments(native: Any, weight_FD: Tensor, rounded: QuantizedWeight) -> Any:
    assert weight_FD.shape == rounded.shape and weight_FD.is_contiguous()
    return native.Rounding(
        _KINDS[weight_FD.dtype],
        _KINDS[rounded.scales.dtype],
        *weight_FD.shape,
        rounded.group_size,
        rounded.bits,
        weight_FD.data_ptr(),
        rounded.codes.data_ptr(),
        rounded.scales.data_ptr(),
    )
