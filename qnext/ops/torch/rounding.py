"""Matrices to integer codes, some rows at a time. Legend: F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.quantized import QuantizedWeight

_ELEMENTS = 1 << 18  # at a time: the search passes over its copies many times, and they must stay in a cache


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
    form: dict[str, Any] = {"divisors": divisors, "bits": bits, "group_size": group_size, "scale_dtype": scale_dtype}
    parts = [reference.round_to_groups(rows, importance_D, **form) for rows in weight_FD.split(_num_rows(weight_FD))]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return QuantizedWeight(codes, scales, bits, group_size)


def rounding_errors(weight_FD: Tensor, rounded: QuantizedWeight) -> Tensor:
    """See ops.rounding_errors."""
    count, parts = _num_rows(weight_FD), []
    for start in range(0, len(weight_FD), count):
        rows = slice(start, start + count)
        zeros = None if rounded.zeros is None else rounded.zeros[rows]
        part = QuantizedWeight(rounded.codes[rows], rounded.scales[rows], rounded.bits, rounded.group_size, zeros)
        parts.append(reference.rounding_errors(weight_FD[rows], part))
    return torch.cat(parts)


def _num_rows(weight_FD: Tensor) -> int:
    return max(1, _ELEMENTS // weight_FD.shape[-1])
