"""Matrices to integer codes: who runs. Legend: F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.ops.backend import is_native, native
from qnext.ops.cpu import rounding as cpu
from qnext.ops.quantized import QuantizedWeight
from qnext.ops.reference import rounding as reference


def round_to_groups(
    weight_FD: Tensor,
    importance_D: Tensor | None = None,
    *,
    divisors: Sequence[float],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """Each weight at its nearest symmetric code, under the scale of its group that costs the least squared error.

    Candidates are the group's extreme value over each of `divisors`, and a least-squares fit to the best one's codes,
    all rounded to `scale_dtype` first; the earlier one wins where errors are equal. `importance_D` (fp32) weighs the
    errors of inputs. The kernels give the bits of the reference. No gradients.
    """
    weight_FD = weight_FD.detach()
    sizes = {"bits": bits, "group_size": group_size}
    if is_native(weight_FD.device) and cpu.fits_rounding(weight_FD, group_size=group_size):
        return cpu.round_to_groups(
            native(), weight_FD, importance_D, divisors=divisors, scale_dtype=scale_dtype, **sizes
        )
    return reference.round_to_groups(weight_FD, importance_D, divisors=divisors, scale_dtype=scale_dtype, **sizes)


def rounding_errors(weight_FD: Tensor, rounded: QuantizedWeight) -> Tensor:
    """fp64 [F, 2]: of each output the sum of squares of what rounding changed, and that of the weights."""
    weight_FD = weight_FD.detach()
    is_plain = rounded.zeros is None and rounded.codes.is_contiguous() and rounded.scales.is_contiguous()
    if is_plain and is_native(weight_FD.device) and cpu.fits_rounding(weight_FD, group_size=rounded.group_size):
        return cpu.rounding_errors(native(), weight_FD, rounded)
    return reference.rounding_errors(weight_FD, rounded)
