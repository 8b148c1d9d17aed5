"""Floats of few bits on disk to numbers: FP8 with scales for blocks, FP4 with scales for groups, bitsandbytes' tables.

Everything is computed in fp32 and rounded once. The code that reads the headers has checked sizes and dtypes. Sources:
OCP Microscaling Formats 1.0 (E2M1, E8M0), compressed-tensors 0.20 (compressors/nvfp4, mxfp4, mxfp8), ModelOpt (export
of NVFP4: weight_scale_2), bitsandbytes (functional.py: dequantize_4bit, dequantize_blockwise).

Legend: F outputs, D inputs, G groups of inputs, N numbers, B blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# E2M1 by code: a sign, two bits of exponent, one behind the point.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_ROWS = 128  # outputs that are computed at a time, so that what is between stays small


def scale_values(scales: Tensor) -> Tensor:
    """Scales in fp32. A byte is an exponent of two, plus 127."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.to(torch.float32)


def from_fp8(weight_FD: Tensor, scales: Tensor, *, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """weight * scale. The outputs and inputs of a `block` share a scale; 0 stands for all of them."""
    num_outputs, num_inputs = weight_FD.shape
    rows, columns = block[0] or num_outputs, block[1] or num_inputs
    grid = scale_values(scales).reshape(-(-num_outputs // rows), -(-num_inputs // columns))
    out_FD = torch.empty(weight_FD.shape, dtype=dtype)
    for start in range(0, num_outputs, _ROWS):
        values = weight_FD[start : start + _ROWS].to(torch.float32)
        part = grid[torch.arange(start, start + len(values)) // rows]
        out_FD[start : start + _ROWS] = values * part.repeat_interleave(columns, dim=1)[:, :num_inputs]
    return out_FD


def from_fp4(
    codes: Tensor,
    scales_FG: Tensor,
    *,
    factor: Tensor | None = None,
    divisor: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """E2M1 codes uint8 [F, D / 2], the lower nibble first, times the scale of their group.

    The scales are multiplied first by `factor` (ModelOpt's weight_scale_2) or divided by `divisor` (compressed-tensors'
    weight_global_scale), each one number.
    """
    scales = scale_values(scales_FG)
    if factor is not None:
        scales = scales * factor.to(torch.float32).reshape(())
    if divisor is not None:
        scales = scales / divisor.to(torch.float32).reshape(())
    return _scaled_nibbles(codes, scales, dtype)


def _scaled_nibbles(codes: Tensor, scales_FG: Tensor, dtype: torch.dtype) -> Tensor:
    table = torch.tensor(E2M1)
    num_outputs, width = codes.shape
    out_FD = torch.empty((num_outputs, 2 * width), dtype=dtype)
    step = max(1, (1 << 20) // max(1, width))
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        nibbles = torch.stack((codes[rows] & 15, codes[rows] >> 4), dim=-1).flatten(-2)
        values = table[nibbles.to(torch.int32)].unflatten(-1, (scales_FG.shape[1], -1))
        out_FD[rows] = (values * scales_FG[rows, :, None]).flatten(-2)
    return out_FD


class Nested(NamedTuple):
    """Block maxima that are quantised themselves: codes into `map`, and a scale for every `block_size` of them."""

    scales_B: Tensor
    map: Tensor
    block_size: int
    offset: float


def from_bitsandbytes(
    codes: Tensor,
    absmax_B: Tensor,
    table: Tensor,
    *,
    shape: tuple[int, int],
    block_size: int,
    nested: Nested | None,
    dtype: torch.dtype,
) -> Tensor:
    """4-bit codes of the whole matrix in one row, the higher nibble first, with one maximum for each block of
    numbers."""
    count = shape[0] * shape[1]
    packed = codes.contiguous().reshape(-1).view(torch.uint8)
    maxima = absmax_B
    if nested is not None:
        factors = nested.scales_B.repeat_interleave(nested.block_size)[: len(absmax_B)]
        maxima = nested.map[absmax_B.to(torch.int32)] * factors + nested.offset
    maxima = maxima.to(torch.float32)
    out_N = torch.empty(count, dtype=dtype)
    step = block_size * max(1, (1 << 21) // block_size)  # whole blocks, and an even number of codes
    for start in range(0, count, step):
        end = min(start + step, count)
        part = packed[start // 2 : -(-end // 2)]
        nibbles = torch.stack((part >> 4, part & 15), dim=-1).flatten()[: end - start]
        factors = maxima[start // block_size : -(-end // block_size)].repeat_interleave(block_size)[: end - start]
        out_N[start:end] = table[nibbles.to(torch.int32)] * factors
    return out_N.view(shape)


def to_fp8(
    values_FD: Tensor, *, block: tuple[int, int], code_dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes [F, D] and scales (a grid of blocks) that from_fp8 reads. The largest number of a block gets the largest
    code.

    Scales in uint8 or float8_e8m0fnu are powers of two, the smallest under which no number is clipped.
    """
    num_outputs, num_inputs = values_FD.shape
    rows, columns = block[0] or num_outputs, block[1] or num_inputs
    grid = -(-num_outputs // rows), -(-num_inputs // columns)
    padding = (0, grid[1] * columns - num_inputs, 0, grid[0] * rows - num_outputs)
    padded = torch.nn.functional.pad(values_FD.to(torch.float32), padding)
    blocks = padded.unflatten(1, (grid[1], columns)).unflatten(0, (grid[0], rows))
    largest = torch.finfo(code_dtype).max
    needed = blocks.abs().amax(dim=(1, 3)) / largest
    needed = torch.where(needed > 0, needed, torch.ones_like(needed))
    if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = needed.log2().ceil().clamp(-127, 127)
        scales = (exponents + 127).to(torch.uint8)
        scales = scales if scale_dtype == torch.uint8 else scales.view(torch.float8_e8m0fnu)
    else:
        scales = needed.to(scale_dtype)
    codes = (blocks / scale_values(scales)[:, None, :, None]).clamp_(-largest, largest).to(code_dtype)
    return codes.flatten(2).flatten(0, 1)[:num_outputs, :num_inputs].contiguous(), scales
