"""The numbers of a GGUF file: rows to blocks of bytes, and back.

Layouts and roundings are those of ggml (ggml-common.h, ggml-quants.c). Every product is fp32.

Legend: R rows, I inputs, N blocks of a row, B bytes; inside a block S sub-blocks, J items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.checkpoint.gguf.block_types import BlockType
from qnext.checkpoint.gguf.codebook_blocks import CODEBOOK_DECODERS
from qnext.checkpoint.gguf.fields import half, nibbles, pairs
from qnext.checkpoint.gguf.small_blocks import SMALL_DECODERS

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def encode(x_RI: Tensor, block: BlockType) -> Tensor:
    """fp32 rows as bytes [R, B], rounded in the same way as by ggml's reference functions."""
    if block.name in _FLOATS:
        return x_RI.to(_FLOATS[block.name]).contiguous().view(torch.uint8)
    x_RNJ = x_RI.unflatten(-1, (-1, block.num_items))
    raw_RNB = _encode_q8_0(x_RNJ) if block.name == "Q8_0" else _encode_q4_0(x_RNJ)
    return raw_RNB.flatten(-2)


def decode(raw_RB: Tensor, block: BlockType) -> Tensor:
    """Bytes [R, B] as fp32 rows [R, I]. Numbers of eight bytes are rounded."""
    if block.name in _FLOATS:
        return raw_RB.view(_FLOATS[block.name]).to(torch.float32)
    return _DECODERS[block.name](raw_RB.unflatten(-1, (-1, block.num_bytes))).flatten(1)


def integer_codes(raw_RB: Tensor, block: BlockType) -> tuple[Tensor, Tensor]:
    """Q8_0 or Q4_0 rows as stored: codes uint8 [R, I], offset by half their range, and scales f16 [R, N].

    value = (code - 128) * scale for Q8_0, (code - 8) * scale for Q4_0.
    """
    raw_RNB = raw_RB.unflatten(-1, (-1, block.num_bytes))
    scale_RN = raw_RNB[..., :2].contiguous().view(torch.float16)[..., 0]
    if block.name == "Q8_0":
        return (raw_RNB[..., 2:] ^ 0x80).flatten(1), scale_RN
    assert block.name == "Q4_0", block
    return nibbles(raw_RNB[..., 2:]).flatten(1), scale_RN


def encode_codes(codes_RI: Tensor, scale_RG: Tensor, block: BlockType, *, bits: int) -> Tensor:
    """Codes of `bits` bits (uint8, offset by half their range) and their scales as bytes of Q8_0 or Q4_0.

    The codes do not change. Scales become f16; a scale of a longer group is repeated in every block of the group. Codes
    of four bits may become Q8_0.
    """
    codes_RNJ = codes_RI.unflatten(-1, (-1, block.num_items))
    scale_RN1 = scale_RG.repeat_interleave(codes_RNJ.shape[-2] // scale_RG.shape[-1], dim=-1)[..., None]
    if block.name == "Q8_0":
        packed = (codes_RNJ + (128 - 2 ** (bits - 1))) ^ 0x80
    else:
        assert (block.name, bits) == ("Q4_0", 4)
        packed = codes_RNJ[..., :16] | (codes_RNJ[..., 16:] << 4)
    return torch.cat((_scale_bytes(scale_RN1.contiguous()), packed), dim=-1).flatten(-2)


def _encode_q8_0(x_RNJ: Tensor) -> Tensor:
    scale_RN1 = x_RNJ.abs().amax(-1, keepdim=True) / 127
    scaled = x_RNJ * _inverse(scale_RN1)
    whole = scaled.trunc()
    # halves go away from zero; torch.round would send them to the even neighbour
    codes_RNJ = whole + torch.where((scaled - whole).abs() >= 0.5, scaled.sign(), 0.0)
    return torch.cat((_scale_bytes(scale_RN1), codes_RNJ.to(torch.int8).view(torch.uint8)), dim=-1)


def _encode_q4_0(x_RNJ: Tensor) -> Tensor:
    """The number of largest magnitude, with its sign, becomes code 0, that is -8."""
    largest_RN1 = x_RNJ.gather(-1, x_RNJ.abs().argmax(-1, keepdim=True))
    scale_RN1 = largest_RN1 / -8
    codes_RNJ = (x_RNJ * _inverse(scale_RN1) + 8.5).to(torch.uint8).clamp_(max=15)
    packed = codes_RNJ[..., :16] | (codes_RNJ[..., 16:] << 4)
    return torch.cat((_scale_bytes(scale_RN1), packed), dim=-1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and zero where that is no number; such scales are zero in f16."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _scale_bytes(scale_RN1: Tensor) -> Tensor:
    return scale_RN1.to(torch.float16).view(torch.uint8)


def _decode_q8_0(raw: Tensor) -> Tensor:
    return raw[..., 2:].contiguous().view(torch.int8).to(torch.float32) * half(raw, 0)


def _decode_q4_0(raw: Tensor) -> Tensor:
    return (nibbles(raw[..., 2:]).to(torch.float32) - 8) * half(raw, 0)


def _decode_q4_1(raw: Tensor) -> Tensor:
    return nibbles(raw[..., 4:]).to(torch.float32) * half(raw, 0) + half(raw, 2)


def _fifth_bits(raw_4: Tensor) -> Tensor:
    """Four bytes as 32 bits, each in the place of the fifth bit of a code."""
    bits = torch.stack([(raw_4 >> shift) & 1 for shift in range(8)], dim=-1)
    return bits.flatten(-2) << 4


def _decode_q5_0(raw: Tensor) -> Tensor:
    codes = nibbles(raw[..., 6:]) | _fifth_bits(raw[..., 2:6])
    return (codes.to(torch.float32) - 16) * half(raw, 0)


def _decode_q5_1(raw: Tensor) -> Tensor:
    codes = nibbles(raw[..., 8:]) | _fifth_bits(raw[..., 4:8])
    return codes.to(torch.float32) * half(raw, 0) + half(raw, 2)


def _decode_q2_k(raw: Tensor) -> Tensor:
    """Scales and minima of 16 sub-blocks (16 bytes), codes (64), scale of scales, scale of minima."""
    scales = raw[..., :16]
    codes_RNSJ = pairs(raw[..., 16:80].unflatten(-1, (2, 32)), bits=2).flatten(-3).unflatten(-1, (16, 16))
    step = half(raw, 80) * (scales & 15)
    minimum = half(raw, 82) * (scales >> 4)
    return (step[..., None] * codes_RNSJ - minimum[..., None]).flatten(-2)


def _decode_q3_k(raw: Tensor) -> Tensor:
    """Upper bits (32 bytes; a set bit means that nothing is subtracted), codes (64), 6-bit scales (12), scale."""
    upper_RNSJ = pairs(raw[..., :32], bits=1)  # [..., 8, 32]
    lower = pairs(raw[..., 32:96].unflatten(-1, (2, 32)), bits=2).flatten(-3, -2)  # [..., 8, 32]
    codes = lower.to(torch.float32) - 4.0 * (1 - upper_RNSJ.to(torch.float32))
    packed = raw[..., 96:108]
    low = nibbles(packed[..., :8])
    high = pairs(packed[..., 8:12], bits=2).flatten(-2)
    scales = (low | (high << 4)).to(torch.float32) - 32
    step = half(raw, 108) * scales
    return (step[..., None] * codes.flatten(-2).unflatten(-1, (16, 16))).flatten(-2)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits each out of 12 bytes."""
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    return scales, minima


def _with_minima(raw: Tensor, codes_RNSJ: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(raw[..., 4:16])
    step, minimum = half(raw, 0) * scales, half(raw, 2) * minima
    return (step[..., None] * codes_RNSJ - minimum[..., None]).flatten(-2)


def _decode_q4_k(raw: Tensor) -> Tensor:
    """Scale of scales, scale of minima, 12 bytes of both, codes (128 bytes)."""
    codes_RNSJ = pairs(raw[..., 16:].unflatten(-1, (4, 32)), bits=4).flatten(-3, -2)
    return _with_minima(raw, codes_RNSJ)


def _decode_q5_k(raw: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the codes."""
    lower = pairs(raw[..., 48:].unflatten(-1, (4, 32)), bits=4).flatten(-3, -2)
    return _with_minima(raw, lower | (pairs(raw[..., 16:48], bits=1) << 4))


def _decode_q6_k(raw: Tensor) -> Tensor:
    """Lower nibbles (128 bytes), upper two bits (64), 16 signed scales, scale of scales."""
    lower = pairs(raw[..., :128].unflatten(-1, (2, 64)), bits=4).flatten(-2)  # [..., 2, 128]
    upper = pairs(raw[..., 128:192].unflatten(-1, (2, 32)), bits=2).flatten(-2)
    codes = (lower | (upper << 4)).flatten(-2).to(torch.float32) - 32
    scales = raw[..., 192:208].contiguous().view(torch.int8).to(torch.float32)
    step = half(raw, 208) * scales
    return (step[..., None] * codes.unflatten(-1, (16, 16))).flatten(-2)


_DECODERS = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    **CODEBOOK_DECODERS,
    **SMALL_DECODERS,
}
