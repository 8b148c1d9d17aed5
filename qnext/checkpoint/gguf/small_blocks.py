"""Blocks of very small numbers: two signs, three or four levels, and four-bit floats with a scale.

Layouts are those of ggml (ggml-common.h, ggml-quants.c).

Legend: R rows, N blocks of a row, B bytes; inside a block S sub-blocks.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qnext.checkpoint.gguf.codebooks import E2M1_LEVELS, levels
from qnext.checkpoint.gguf.fields import half, in_turn, nibbles, pairs


def _trits(raw: Tensor, *, count: int) -> Tensor:
    """[..., J] bytes as [..., count * J] numbers of -1, 0 and 1.

    A byte is a fraction of 256; times a power of three, modulo one, a third of it says the digit.
    """
    digits = [(((raw.to(torch.int32) * 3**place) & 255) * 3) >> 8 for place in range(count)]
    return torch.cat(digits, dim=-1) - 1


def decode_tq1_0(raw: Tensor) -> Tensor:
    """Five digits to a byte (32 bytes, then 16), four to each of four bytes, scale."""
    parts = (_trits(raw[..., :32], count=5), _trits(raw[..., 32:48], count=5), _trits(raw[..., 48:52], count=4))
    return half(raw, 52) * torch.cat(parts, dim=-1)


def decode_tq2_0(raw: Tensor) -> Tensor:
    """Four codes to a byte, scale."""
    codes = pairs(raw[..., :64].unflatten(-1, (2, 32)), bits=2).flatten(-3)
    return half(raw, 64) * (codes.to(torch.float32) - 1)


def decode_q1_0(raw: Tensor) -> Tensor:
    """Scale, a sign for each number: a set bit is plus."""
    return half(raw, 0) * (2 * in_turn(raw[..., 2:], bits=1, count=8).to(torch.float32) - 1)


def decode_q2_0(raw: Tensor) -> Tensor:
    """Scale, codes that stand for -1 to 2."""
    return half(raw, 0) * (in_turn(raw[..., 2:], bits=2, count=4).to(torch.float32) - 1)


def decode_mxfp4(raw: Tensor) -> Tensor:
    """An exponent, codes. The levels are doubled, so that the scale is half of what the exponent says."""
    exponent = raw[..., :1].to(torch.int32)
    # Below the smallest normal number the bits are those of a fraction.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32) * levels(E2M1_LEVELS)[nibbles(raw[..., 1:]).to(torch.int64)]


@cache
def _half_e4m3() -> Tensor:
    """Half of the number that each byte stands for as E4M3 without a sign; 0x7f is zero."""
    values = []
    for byte in range(256):
        exponent, fraction = (byte >> 3) & 15, byte & 7
        value = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction * 2.0**-9
        values.append(0.0 if byte == 0x7F else value / 2)
    return torch.tensor(values, dtype=torch.float32)


def decode_nvfp4(raw: Tensor) -> Tensor:
    """Scales of four sub-blocks, their codes of 8 bytes each, with the same doubled levels."""
    scale_RNS = _half_e4m3()[raw[..., :4].to(torch.int64)]
    codes = nibbles(raw[..., 4:].unflatten(-1, (4, 8)))
    return (scale_RNS[..., None] * levels(E2M1_LEVELS)[codes.to(torch.int64)]).flatten(-2)


SMALL_DECODERS = {
    "Q1_0": decode_q1_0,
    "Q2_0": decode_q2_0,
    "TQ1_0": decode_tq1_0,
    "TQ2_0": decode_tq2_0,
    "MXFP4": decode_mxfp4,
    "NVFP4": decode_nvfp4,
}
