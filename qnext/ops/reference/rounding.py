"""Matrices to integer codes with a scale for each group of inputs, chosen among candidates.

Legend: F outputs, D inputs, G groups of inputs, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.quantized import QuantizedWeight, pack_codes

_LANES = 16


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
    groups_FGS = weight_FD.to(torch.float32).unflatten(-1, (-1, group_size))
    weights_GS = None if importance_D is None else importance_D.view(-1, group_size)
    scale_FG1 = _search(groups_FGS, weights_GS, divisors, bits, scale_dtype)
    steps_FGS = _held((groups_FGS / scale_FG1).round_(), bits)
    codes_FD = steps_FGS.add_(2 ** (bits - 1)).to(torch.uint8).flatten(-2)
    return QuantizedWeight(pack_codes(codes_FD, bits=bits), scale_FG1.squeeze(-1).to(scale_dtype), bits, group_size)


def _search(
    groups_FGS: Tensor, weights_GS: Tensor | None, divisors: Sequence[float], bits: int, scale_dtype: torch.dtype
) -> Tensor:
    extreme = groups_FGS.gather(-1, groups_FGS.abs().argmax(-1, keepdim=True))
    best = torch.ones_like(extreme)
    least = torch.full_like(extreme, torch.inf)

    def consider(candidate: Tensor) -> None:
        nonlocal best, least
        # Codes are chosen for the scale as it is stored, so that its own rounding costs next to nothing. Errors are
        # those of products with the reciprocal: a division for each would take as long as all else.
        scale = candidate.to(scale_dtype).float()
        scale = torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)
        quotients = groups_FGS * scale.reciprocal()
        square = _held(quotients.round(), bits).sub_(quotients).square_()
        error = _sum(square if weights_GS is None else square.mul_(weights_GS)) * (scale * scale)
        is_better = error < least
        best, least = torch.where(is_better, scale, best), torch.where(is_better, error, least)

    for divisor in divisors:
        consider(extreme / divisor)
    steps = _held((groups_FGS * best.reciprocal()).round_(), bits)
    weighted = steps if weights_GS is None else steps * weights_GS
    consider(_sum(weighted * groups_FGS) / _sum(weighted * steps))
    return best


def _held(steps: Tensor, bits: int) -> Tensor:
    """Between the outermost codes, in place."""
    zero = 2 ** (bits - 1)
    return steps.clamp_(-zero, zero - 1)


def _sum(values: Tensor) -> Tensor:
    """Over the last dim, which is kept, in an order that every kernel can have: sixteen sums side by side, then halves
    of them are added, quarters, and so on."""
    sixteens = F.pad(values, (0, -values.shape[-1] % _LANES)).unflatten(-1, (-1, _LANES))
    total = sixteens[..., 0, :]
    for i in range(1, sixteens.shape[-2]):
        total = total + sixteens[..., i, :]
    while total.shape[-1] > 1:
        low, high = total.chunk(2, dim=-1)
        total = low + high
    return total


def rounding_errors(weight_FD: Tensor, rounded: QuantizedWeight) -> Tensor:
    """See ops.rounding_errors."""
    original = weight_FD.to(torch.float32)
    gaps = rounded.dequantize().sub_(original)
    return torch.stack([each.square().sum(-1, dtype=torch.float64) for each in (gaps, original)], dim=-1)
