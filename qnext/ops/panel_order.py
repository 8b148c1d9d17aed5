"""Quantised matrices as the kernels read them, outputs in panels of sixteen: the order of the bytes, by PyTorch.

linear.h describes the same. Legend: F outputs, D inputs, P panels of 16 outputs, G groups of inputs, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16


def codes_to_panels(codes_FB: Tensor, *, bits: int) -> Tensor:
    """uint8 codes in rows [F, D * bits / 8] -> [P, 16 * D * bits / 8]; F is a multiple of 16."""
    if bits == 4:
        # byte j of a word holds inputs j and 4 + j; in rows it holds 2 j and 2 j + 1
        codes_FD = torch.stack((codes_FB & 15, codes_FB >> 4), dim=-1).flatten(-2).unflatten(-1, (-1, 2, 4))
        codes_FB = (codes_FD[..., 0, :] | (codes_FD[..., 1, :] << 4)).flatten(-2)
    words = codes_FB.contiguous().view(torch.int32)
    return groups_to_panels(words).flatten(1).view(torch.uint8)


def codes_from_panels(panels_PB: Tensor, *, num_inputs: int, bits: int) -> Tensor:
    """[P, 16 * D * bits / 8] -> uint8 codes in rows [16 P, D * bits / 8]."""
    words = panels_PB.view(torch.int32).unflatten(-1, (num_inputs * bits // 32, PANEL))
    codes = groups_from_panels(words).view(torch.uint8)
    if bits == 8:
        return codes
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).unflatten(-2, (-1, 4))
    ordered = nibbles.transpose(-1, -2).flatten(-3).unflatten(-1, (-1, 2))
    return ordered[..., 0] | (ordered[..., 1] << 4)


def groups_to_panels(values_FG: Tensor) -> Tensor:
    """[F, G] -> [P, G, 16]; F is a multiple of 16."""
    return values_FG.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def groups_from_panels(panels_PGO: Tensor) -> Tensor:
    """[P, G, 16] -> [16 P, G]"""
    return panels_PGO.transpose(1, 2).flatten(0, 1).contiguous()
