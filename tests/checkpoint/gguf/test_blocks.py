"""Rounding and layout of blocks, bit for bit against the reference implementation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from qnext.checkpoint.gguf.block_types import BLOCK_TYPES
from qnext.checkpoint.gguf.blocks import decode, encode, encode_codes, integer_codes
from qnext.checkpoint.gguf.codebooks import codebook

# bytes of a block that hold f16 scales
SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
# types that the reference package writes; the others have no rounding of their own there
WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
# types that the reference package names and does not decode
WITHOUT_REFERENCE = ("Q1_0", "Q2_0", "F64")


def rows() -> np.ndarray:
    """Ordinary numbers, and blocks that try the corners of rounding."""
    rng = np.random.default_rng(3)
    x_RI = rng.standard_normal((40, 96), dtype=np.float32) * np.exp(rng.uniform(-12, 6, (40, 1))).astype(np.float32)
    x_RI[0] = 0.0
    x_RI[1, :32] = np.tile([3.0, -3.0], 16)  # a tie for the largest magnitude
    x_RI[2, :32] = np.tile([-3.0, 3.0], 16)
    x_RI[3, :32] = np.linspace(-127, 127, 32)
    x_RI[4, :32] = np.arange(32) * 0.5  # halves
    x_RI[4, 31] = 127.0
    x_RI[5, :32] = -np.arange(32) * 0.5
    x_RI[5, 31] = -127.0
    x_RI[6, :] = 1e-30  # the scale is below what f16 can hold
    x_RI[7, :] = np.float32(2.0**-140)  # below the smallest normal number: its inverse is infinite
    x_RI[8, 5] = 60_000.0
    x_RI[9, :32] = np.nextafter(np.float32(0.5), np.float32(0)) * 1.0
    x_RI[9, 0] = 127.0
    return x_RI


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_rounding_is_that_of_ggml(name: str) -> None:
    x_RI = rows()
    if name in ("Q8_0", "Q4_0"):
        x_RI[7] = 0.0  # 1 / scale is infinite there, and what a number times infinity rounds to is undefined in C
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x_RI, gguf.GGMLQuantizationType[name]).view(np.uint8)
    assert np.array_equal(encode(torch.from_numpy(x_RI), BLOCK_TYPES[name]).numpy(), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_rounding_errors_are_at_most_half_a_step(name: str) -> None:
    """Apart from the code that Q4_0 lacks: +8."""
    x_RI = torch.from_numpy(rows()[10:])
    block = BLOCK_TYPES[name]
    raw_RB = encode(x_RI, block)
    _, scales = integer_codes(raw_RB, block)
    error = (decode(raw_RB, block) - x_RI).abs().unflatten(-1, (-1, 32))
    step = scales.float().abs()[..., None]
    largest = 0.5 if name == "Q8_0" else 1.0
    assert bool((error <= step * largest * 1.01 + 127 * step * 2**-11 + 127 * 2**-25).all())


def random_blocks(name: str) -> np.ndarray:
    """Any bytes [6, 30, B], with scales that are numbers."""
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (6, 30, BLOCK_TYPES[name].num_bytes), dtype=np.uint8)
    for at in SCALES.get(name, ()):
        raw[..., at : at + 2] = rng.standard_normal((6, 30)).astype(np.float16)[..., None].view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = np.arange(180).reshape(6, 30) + 70
        raw[0, :5, 0] = [0, 1, 2, 251, 3]  # beyond 251 the largest level is infinite
    if name == "IQ1_M":  # the upper byte of the f16 number lies in the upper halves of two bytes
        raw[..., 55] = (raw[..., 55] & 0x8F) | 0x30
    return raw


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in WITHOUT_REFERENCE])
def test_decoding_is_that_of_ggml(name: str) -> None:
    block = BLOCK_TYPES[name]
    rng = np.random.default_rng(5)
    raw = random_blocks(name)
    if block.num_items == 1:
        raw = rng.standard_normal((6, 256)).astype(np.float32)
        raw = gguf.quants.quantize(raw, gguf.GGMLQuantizationType[name]).view(np.uint8)
    raw = raw.reshape(6, -1)
    stored = raw.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    assert np.isfinite(expected).all() and len(np.unique(expected)) > 100
    assert np.array_equal(decode(torch.from_numpy(raw), block).numpy(), expected)


def test_signs_and_four_levels() -> None:
    """Q1_0 and Q2_0 against loops over the formula in ggml-quants.c: dequantize_row_q1_0 and _q2_0."""
    for name, bits in (("Q1_0", 1), ("Q2_0", 2)):
        block = BLOCK_TYPES[name]
        raw_RNB = random_blocks(name)
        for raw_NB, values_I in zip(raw_RNB, decode(torch.from_numpy(raw_RNB).flatten(1), block), strict=True):
            for raw_B, values_J in zip(raw_NB, values_I.unflatten(0, (-1, block.num_items)), strict=True):
                scale = float(raw_B[:2].view(np.float16)[0])
                whole = int.from_bytes(raw_B[2:].tobytes(), "little")
                codes = [(whole >> (bits * i)) & (2**bits - 1) for i in range(block.num_items)]
                levels = (-1, 1) if bits == 1 else (-1, 0, 1, 2)
                assert values_J.tolist() == [scale * levels[code] for code in codes]


def test_numbers_of_eight_bytes() -> None:
    x_RI = np.random.default_rng(2).standard_normal((3, 7))
    raw_RB = torch.from_numpy(x_RI).view(torch.uint8)
    assert np.array_equal(decode(raw_RB, BLOCK_TYPES["F64"]).numpy(), x_RI.astype(np.float32))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_quantised_matrix_is_decoded_as_the_reference_does(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    x_RI = np.random.default_rng(6).standard_normal((5, 512), dtype=np.float32) * 0.02
    raw_RB = gguf.quants.quantize(x_RI, kind)
    values = decode(torch.from_numpy(raw_RB), BLOCK_TYPES[name]).numpy()
    assert np.array_equal(values, gguf.quants.dequantize(raw_RB, kind))
    assert np.abs(values - x_RI).max() < 0.07  # the coarsest keeps the largest number of a block and zero


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks_are_those_of_ggml(name: str) -> None:
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    assert np.array_equal(codebook(name).numpy(), theirs.grid.reshape(theirs.grid_shape))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_codes_times_scales_are_the_numbers(name: str) -> None:
    """What a groupwise integer weight needs: the same numbers out of codes and scales of groups of 32."""
    block = BLOCK_TYPES[name]
    raw_RB = encode(torch.from_numpy(rows()), block)
    codes_RI, scales_RN = integer_codes(raw_RB, block)
    assert codes_RI.dtype == torch.uint8
    grouped = codes_RI.unflatten(-1, (-1, 32)).float() - (128 if name == "Q8_0" else 8)
    values = (grouped * scales_RN.float()[..., None]).flatten(1)
    assert torch.equal(values, decode(raw_RB, block))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_codes_go_back_as_they_came(name: str) -> None:
    """Any codes, scales of both signs."""
    block = BLOCK_TYPES[name]
    rng = np.random.default_rng(4)
    raw = rng.integers(0, 256, (5, 3, block.num_bytes), dtype=np.uint8)
    raw[..., :2] = rng.standard_normal((5, 3, 1)).astype(np.float16).view(np.uint8)
    raw_RB = torch.from_numpy(raw).flatten(1)
    codes_RI, scales_RN = integer_codes(raw_RB, block)
    bits = 8 if name == "Q8_0" else 4
    assert torch.equal(encode_codes(codes_RI, scales_RN.float(), block, bits=bits), raw_RB)
    if name == "Q4_0":
        wide_RB = encode_codes(codes_RI, scales_RN.float(), BLOCK_TYPES["Q8_0"], bits=4)
        assert torch.equal(decode(wide_RB, BLOCK_TYPES["Q8_0"]), decode(raw_RB, block))


def test_a_scale_of_a_long_group_goes_to_each_block() -> None:
    codes_RI = torch.arange(128, dtype=torch.uint8).view(1, 128) % 16
    scale_RG = torch.tensor([[0.5, -2.0]])
    values = decode(encode_codes(codes_RI, scale_RG, BLOCK_TYPES["Q4_0"], bits=4), BLOCK_TYPES["Q4_0"])
    assert torch.equal(values, (codes_RI.float() - 8) * scale_RG.repeat_interleave(64, dim=1))
