"""Matrices to integer codes: the first backend that serves a call computes it. Legend: F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext.ops.choice import run
from qnext.ops.quantized import QuantizedWeight


def round_to_groups(
    weight_FD: Tensor,
    importance_D: Tensor | None = None,
    *,
    divisors: Sequence[float],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """Each weight becomes its nearest symmetric code, under the scale of its group with the least squared error.

    The candidates are the group's extreme value over each of `divisors`, and a least-squares fit to the codes of the
    best one. All are rounded to `scale_dtype` first. The earlier one wins where errors are equal. `importance_D` (fp32)
    weighs the errors of inputs. The kernels give the bits of the reference. No gradients.
    """
    weight_FD = weight_FD.detach()
    form: dict[str, Any] = {"divisors": divisors, "bits": bits, "group_size": group_size, "scale_dtype": scale_dtype}
    return run("round_to_groups", weight_FD, importance_D, **form)


def rounding_errors(weight_FD: Tensor, rounded: QuantizedWeight) -> Tensor:
    """fp64 [F, 2]: for each output the sum of squares of the rounding errors, and the sum of squares of the weights."""
    weight_FD = weight_FD.detach()
    return run("rounding_errors", weight_FD, rounded)
