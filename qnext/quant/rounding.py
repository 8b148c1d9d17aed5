"""Matrices to integer codes: to nearest with a search for the scales, or GPTQ with the second moment of the inputs.

GPTQ is arXiv 2210.17323: inputs are rounded one after another, and the inputs that are not rounded yet compensate for
the error of each.

Legend: F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.ops import QuantizedWeight, round_to_groups
from qnext.ops.quantized import pack_codes
from qnext.quant.scheme import QuantScheme

_BLOCK_ELEMENTS = 1 << 22  # of the weight, at a time: calibration keeps a few copies
_BLOCK_INPUTS = 128  # inputs whose errors are applied to the later ones in one product
DAMPING = 0.01  # of the mean of the diagonal, as in the paper


def round_nearest(
    weight_FD: Tensor, scheme: QuantScheme, *, scale_dtype: torch.dtype, importance_D: Tensor | None = None
) -> QuantizedWeight:
    """Each weight becomes its nearest code, under the scales with the least squared error, weighted by `importance_D`.

    The candidates put the group's extreme value near the outermost code of either side: from a little outside (the
    extreme is clipped) to a little inside. One more candidate is a least-squares fit to the codes of the best one. A
    scale may be negative: there is one more code below zero than above, and the extreme value gets it whatever its
    sign. `weight_FD` is [F, D] of any float.
    """
    return round_to_groups(
        weight_FD,
        importance_D,
        divisors=_divisors(scheme.bits),
        bits=scheme.bits,
        group_size=scheme.group_size,
        scale_dtype=scale_dtype,
    )


def _divisors(bits: int) -> list[float]:
    """Steps from zero to the extreme value; negative ones put it on the side that has one code more."""
    if bits == 8:
        return [-128.0, 127.0]
    reach = 2.0 ** (bits - 1)
    below = [offset - reach for offset in (-1.6, -1.2, -0.8, -0.4, 0.0, 0.25, 0.5, 0.75)]
    return below + [reach - offset for offset in (-0.4, 0.0, 0.5, 1.0, 1.25, 1.5)]


def round_calibrated(
    weight_FD: Tensor, moment_DD: Tensor, scheme: QuantScheme, *, scale_dtype: torch.dtype, damping: float = DAMPING
) -> QuantizedWeight:
    """Codes that preserve the outputs for the inputs of `moment_DD` (fp32, the mean of x x^T up to a factor).

    Scales are chosen first; each input weighs as its mean square. Then inputs are rounded in the order of their mean
    squares, the largest first, while most of the others can still compensate for its error.
    """
    factor_DD, order_D = _inverse_factor(moment_DD, damping)
    diagonal_D = moment_DD.diagonal()
    importance_D = diagonal_D + damping * diagonal_D.mean() + 1e-30
    group_D = order_D // scheme.group_size
    codes, scales = [], []
    for block in weight_FD.split(max(1, _BLOCK_ELEMENTS // weight_FD.shape[-1])):
        wide = block.to(torch.float32)
        scale_FG = round_nearest(wide, scheme, scale_dtype=scale_dtype, importance_D=importance_D).scales
        ordered = _round_in_order(wide[:, order_D], scale_FG.float()[:, group_D], factor_DD, scheme)
        codes.append(pack_codes(torch.empty_like(ordered).index_copy_(1, order_D, ordered), bits=scheme.bits))
        scales.append(scale_FG)
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), scheme.bits, scheme.group_size)


def _inverse_factor(moment_DD: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper triangle U with U^T U = inverse of the damped moment, inputs in the order that is returned with it."""
    diagonal_D = moment_DD.diagonal()
    mean = diagonal_D.mean()
    if not mean > 0:
        moment_DD, mean = torch.eye(len(moment_DD)), torch.ones(())
        diagonal_D = moment_DD.diagonal()
    order_D = diagonal_D.argsort(descending=True, stable=True)
    ordered = moment_DD[order_D][:, order_D] / mean
    identity = torch.eye(len(ordered))
    while True:
        lower, failed = torch.linalg.cholesky_ex(ordered + damping * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, order_D
        damping *= 10.0  # inputs so dependent that fp32 sees a singular matrix


def _round_in_order(weight_FD: Tensor, scale_FD: Tensor, factor_DD: Tensor, scheme: QuantScheme) -> Tensor:
    """uint8 codes [F, D] of inputs rounded from left to right; `weight_FD` is overwritten."""
    codes_FD = torch.empty(weight_FD.shape, dtype=torch.uint8)
    num_inputs = weight_FD.shape[1]
    zero = 2 ** (scheme.bits - 1)
    for start in range(0, num_inputs, _BLOCK_INPUTS):
        end = min(start + _BLOCK_INPUTS, num_inputs)
        # Inputs lie in rows here: one input of all outputs is contiguous.
        block = weight_FD[:, start:end].t().contiguous()
        scale = scale_FD[:, start:end].t().contiguous()
        inner = factor_DD[start:end, start:end]
        errors, codes = torch.empty_like(block), torch.empty_like(block)
        for i in range(end - start):
            steps = torch.div(block[i], scale[i], out=codes[i]).round_().clamp_(-zero, zero - 1)
            errors[i] = torch.addcmul(block[i], steps, scale[i], value=-1.0).div_(inner[i, i])
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1.0)
        codes_FD[:, start:end] = codes.add_(zero).to(torch.uint8).t()
        weight_FD[:, end:].addmm_(errors.t(), factor_DD[start:end, end:], alpha=-1.0)
    return codes_FD
