"""Fields of blocks: numbers of two bytes, and codes of a few bits that share a byte.

Legend: R rows, N blocks of a row, B bytes; J items.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half(raw_RNB: Tensor, start: int) -> Tensor:
    """The f16 number at byte `start` of every block, as fp32 [R, N, 1]."""
    return raw_RNB[..., start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def unsigned(raw: Tensor, *, num_bytes: int) -> Tensor:
    """Little-endian numbers of two or four bytes, as int64."""
    dtype = {2: torch.int16, 4: torch.int32}[num_bytes]
    return raw.contiguous().view(dtype).to(torch.int64) & (256**num_bytes - 1)


def nibbles(raw: Tensor) -> Tensor:
    """All lower nibbles, then all upper ones."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def pairs(raw: Tensor, *, bits: int) -> Tensor:
    """[..., J] bytes as [..., 8 / bits, J] fields, the lowest bits first: field after field of all bytes."""
    return torch.stack([(raw >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-2)


def in_turn(raw: Tensor, *, bits: int, count: int) -> Tensor:
    """[..., J] numbers as [..., J * count] fields of `bits` bits, the lowest first: all fields of a number together."""
    fields = [(raw >> shift) & (2**bits - 1) for shift in range(0, count * bits, bits)]
    return torch.stack(fields, dim=-1).flatten(-2)
