"""Blocks of the IQ types: indices of points of a codebook, signs, and scales in a few bits.

Layouts are those of ggml (ggml-common.h, ggml-quants.c); every product is fp32 and exact but for the last.

Legend: R rows, N blocks of a row, B bytes; inside a block S sub-blocks, P points, J numbers of a point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.checkpoint.gguf.codebooks import IQ4_LEVELS, codebook, levels
from qnext.checkpoint.gguf.fields import half, in_turn, nibbles, unsigned

_IQ1_SHIFT = 0.125


def _points(name: str, index: Tensor) -> Tensor:
    """[...] indices as [..., J] numbers."""
    book_PJ = codebook(name)
    return book_PJ.index_select(0, index.reshape(-1).to(torch.int64)).view(*index.shape, book_PJ.shape[1])


def _signs(raw: Tensor) -> Tensor:
    """Bytes [...] as [..., 8] factors, -1 where the bit is set, the lowest first."""
    bits = torch.stack([(raw >> shift) & 1 for shift in range(8)], dim=-1)
    return 1.0 - 2.0 * bits.to(torch.float32)


def _seven_signs(codes: Tensor) -> Tensor:
    """Seven sign bits stand for eight: the number of minus signs is even."""
    parity = codes ^ (codes >> 4)
    parity = parity ^ (parity >> 2)
    return _signs(codes | (((parity ^ (parity >> 1)) & 1) << 7))


def _scaled(scale_RNS: Tensor, numbers: Tensor) -> Tensor:
    """Every sub-block times its scale, as [R, N, items of the block]."""
    return (scale_RNS[..., None] * numbers.flatten(2).unflatten(-1, (scale_RNS.shape[-1], -1))).flatten(-2)


def decode_iq2_xxs(raw: Tensor) -> Tensor:
    """Scale, then for each 32 numbers four indices of a byte and a word of four signs and a scale."""
    words_RNSB = raw[..., 2:].unflatten(-1, (8, 8))
    rest_RNS = unsigned(words_RNSB[..., 4:], num_bytes=4)
    signs = _seven_signs(in_turn(rest_RNS, bits=7, count=4))
    scale = half(raw, 0) * (0.5 + (rest_RNS[..., 0] >> 28)) * 0.25
    return _scaled(scale, _points("IQ2_XXS", words_RNSB[..., :4]) * signs)


def decode_iq2_xs(raw: Tensor) -> Tensor:
    """Scale, 32 words of an index (9 bits) and signs (7), 16 scales of four bits."""
    words_RNP = unsigned(raw[..., 2:66], num_bytes=2)
    scale = half(raw, 0) * (0.5 + in_turn(raw[..., 66:], bits=4, count=2)) * 0.25
    return _scaled(scale, _points("IQ2_XS", words_RNP & 511) * _seven_signs(words_RNP >> 9))


def decode_iq2_s(raw: Tensor) -> Tensor:
    """Scale, 32 lower bytes of indices, 32 bytes of signs, upper two bits of indices, 16 scales of four bits."""
    upper = in_turn(raw[..., 66:74], bits=2, count=4).to(torch.int64) << 8
    scale = half(raw, 0) * (0.5 + in_turn(raw[..., 74:], bits=4, count=2)) * 0.25
    return _scaled(scale, _points("IQ2_S", raw[..., 2:34] | upper) * _signs(raw[..., 34:66]))


def decode_iq3_xxs(raw: Tensor) -> Tensor:
    """Scale, 64 indices of a byte, and for each 32 numbers a word of four signs and a scale."""
    rest_RNS = unsigned(raw[..., 66:], num_bytes=4)
    signs = _seven_signs(in_turn(rest_RNS, bits=7, count=4))
    scale = half(raw, 0) * (0.5 + (rest_RNS >> 28)) * 0.5
    return _scaled(scale, _points("IQ3_XXS", raw[..., 2:66]).flatten(-2) * signs.flatten(-2))


def decode_iq3_s(raw: Tensor) -> Tensor:
    """Scale, 64 lower bytes of indices, their ninth bits, 32 bytes of signs, 8 scales of four bits."""
    upper = in_turn(raw[..., 66:74], bits=1, count=8).to(torch.int64) << 8
    scale = half(raw, 0) * (1 + 2 * in_turn(raw[..., 106:], bits=4, count=2).to(torch.float32))
    numbers = _points("IQ3_S", raw[..., 2:66] | upper).flatten(-2)
    return _scaled(scale, numbers * _signs(raw[..., 74:106]).flatten(-2))


def decode_iq1_s(raw: Tensor) -> Tensor:
    """Scale, 32 lower bytes of indices, 8 words of four times three upper bits, a scale of three, a direction."""
    words_RNS = unsigned(raw[..., 34:], num_bytes=2)
    upper = in_turn(words_RNS, bits=3, count=4) << 8
    scale = half(raw, 0) * (2 * ((words_RNS >> 12) & 7) + 1)
    shift_RNS = torch.where(words_RNS < 0x8000, _IQ1_SHIFT, -_IQ1_SHIFT)
    points = _points("IQ1_S", raw[..., 2:34] | upper).unflatten(2, (8, 4))
    return _scaled(scale, points + shift_RNS[..., None, None])


def decode_iq1_m(raw: Tensor) -> Tensor:
    """32 lower bytes of indices, for each a nibble of three upper bits and a direction, four words of scales.

    A word holds four scales of three bits, and above them a quarter of the f16 scale, the lowest first.
    """
    rest = in_turn(raw[..., 32:48], bits=4, count=2).to(torch.int64)
    words = unsigned(raw[..., 48:], num_bytes=2)
    quarters = words >> 12
    bits = quarters[..., 0] | (quarters[..., 1] << 4) | (quarters[..., 2] << 8) | (quarters[..., 3] << 12)
    scale_RN1 = bits.to(torch.int32).to(torch.int16).view(torch.float16).to(torch.float32)[..., None]
    scale = scale_RN1 * (2 * in_turn(words, bits=3, count=4) + 1)
    shift = torch.where(rest < 8, _IQ1_SHIFT, -_IQ1_SHIFT)
    return _scaled(scale, _points("IQ1_S", raw[..., :32] | ((rest & 7) << 8)) + shift[..., None])


def decode_iq4_nl(raw: Tensor) -> Tensor:
    """Scale, 16 bytes of codes."""
    return half(raw, 0) * levels(IQ4_LEVELS)[nibbles(raw[..., 2:]).to(torch.int64)]


def decode_iq4_xs(raw: Tensor) -> Tensor:
    """Scale, upper two bits of 8 scales, their lower four, codes (128 bytes)."""
    upper = in_turn(unsigned(raw[..., 2:4], num_bytes=2), bits=2, count=8)
    scales = (in_turn(raw[..., 4:8], bits=4, count=2) | (upper << 4)) - 32
    codes = nibbles(raw[..., 8:].unflatten(-1, (8, 16)))
    return _scaled(half(raw, 0) * scales, levels(IQ4_LEVELS)[codes.to(torch.int64)])


CODEBOOK_DECODERS = {
    "IQ1_S": decode_iq1_s,
    "IQ1_M": decode_iq1_m,
    "IQ2_XXS": decode_iq2_xxs,
    "IQ2_XS": decode_iq2_xs,
    "IQ2_S": decode_iq2_s,
    "IQ3_XXS": decode_iq3_xxs,
    "IQ3_S": decode_iq3_s,
    "IQ4_NL": decode_iq4_nl,
    "IQ4_XS": decode_iq4_xs,
}
