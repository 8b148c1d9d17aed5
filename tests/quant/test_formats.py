"""Layouts on disk against the reference library (compressed-tensors) or unpackers that follow the layout bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext.ops.quantized import QuantizedWeight, pack_codes
from qnext.quant.formats import (
    compressed_tensors_of,
    compressed_tensors_specs,
    from_awq,
    from_gptq,
    from_int_quantized,
    from_pack_quantized,
    pack_words,
    unpack_words,
)

from .theirs import pack_to_int32, unpack_from_int32

# outputs, inputs, group; no two equal; the last is a group as long as the row (strategy channel)
SIZES = [(24, 64, 16), (8, 96, 32), (40, 48, 48)]


def random_weight(
    sizes: tuple[int, int, int], *, bits: int, has_zeros: bool, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedWeight, Tensor]:
    """A weight and its codes, one to a byte."""
    num_outputs, num_inputs, group_size = sizes
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 2**bits, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    groups = (num_outputs, num_inputs // group_size)
    scales = torch.rand(groups, generator=generator).to(dtype) + 0.25
    zeros = torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8) if has_zeros else None
    return QuantizedWeight(pack_codes(codes, bits=bits), scales, bits, group_size, zeros), codes


def assert_same(ours: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert (ours.bits, ours.group_size, ours.shape) == (expected.bits, expected.group_size, expected.shape)
    assert torch.equal(ours.codes, expected.codes)
    assert torch.equal(ours.scales, expected.scales)
    assert (ours.zeros is None) == (expected.zeros is None)
    assert ours.zeros is None or expected.zeros is None or torch.equal(ours.zeros, expected.zeros)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [8, 10, 34])
def test_words_are_those_of_compressed_tensors(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (6, count), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack_words(codes, bits=bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_words(words, bits=bits)[:, :count], codes)


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [*SIZES, (6, 20, 10)])
def test_written_is_read_back_and_read_by_the_reference(
    sizes: tuple[int, int, int], bits: int, has_zeros: bool
) -> None:
    weight, codes = random_weight(sizes, bits=bits, has_zeros=has_zeros, dtype=torch.bfloat16)
    num_outputs, num_inputs, group_size = sizes
    tensors = compressed_tensors_of("m", weight)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == compressed_tensors_specs(
        "m",
        (num_outputs, num_inputs),
        bits=bits,
        group_size=group_size,
        scale_dtype=torch.bfloat16,
        has_zeros=has_zeros,
    )
    assert tensors["m.weight_shape"].tolist() == [num_outputs, num_inputs]
    unpacked = unpack_from_int32(tensors["m.weight_packed"], bits, torch.Size((num_outputs, num_inputs)))
    assert torch.equal(unpacked.to(torch.int16) + 2 ** (bits - 1), codes.to(torch.int16))
    zero_point = tensors.get("m.weight_zero_point")
    if weight.zeros is not None:
        signed = unpack_from_int32(zero_point, bits, torch.Size(weight.zeros.shape), packed_dim=0)
        assert torch.equal(signed.to(torch.int16) + 2 ** (bits - 1), weight.zeros.to(torch.int16))
    read = from_pack_quantized(
        tensors["m.weight_packed"], tensors["m.weight_scale"], zero_point, num_inputs=num_inputs, bits=bits
    )
    assert_same(read, weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_zero_points_of_older_files_are_not_packed(sizes: tuple[int, int, int], bits: int) -> None:
    weight, _ = random_weight(sizes, bits=bits, has_zeros=True)
    assert weight.zeros is not None
    signed = (weight.zeros.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = compressed_tensors_of("m", weight)["m.weight_packed"]
    assert_same(from_pack_quantized(packed, weight.scales, signed, num_inputs=sizes[1], bits=bits), weight)


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_int_quantized_is_the_formula(bits: int, has_zeros: bool) -> None:
    weight, codes = random_weight(SIZES[0], bits=bits, has_zeros=has_zeros)
    half = 2 ** (bits - 1)
    signed = (codes.to(torch.int16) - half).to(torch.int8)
    zero_point = None if weight.zeros is None else (weight.zeros.to(torch.int16) - half).to(torch.int8)
    read = from_int_quantized(signed, weight.scales, zero_point, bits=bits)
    assert_same(read, weight)
    shift = 0.0 if zero_point is None else zero_point.float().repeat_interleave(SIZES[0][2], dim=1)
    expected = (signed.float() - shift) * weight.scales.repeat_interleave(SIZES[0][2], dim=1)
    assert torch.equal(read.dequantize(), expected)


def words_of(columns: list[list[int]], *, bits: int) -> Tensor:
    """int32 of the given codes, lowest first, by arithmetic on Python's integers."""
    words = [sum(code << (bits * i) for i, code in enumerate(column)) for column in columns]
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)


def awq_words(codes_XF: Tensor) -> Tensor:
    """AutoAWQ's order: the i-th nibble of a word holds output 8 * word + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return torch.stack(
        [words_of([[row[8 * w + o] for o in order] for w in range(len(row) // 8)], bits=4) for row in codes_XF.tolist()]
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_awq(sizes: tuple[int, int, int]) -> None:
    weight, codes = random_weight(sizes, bits=4, has_zeros=True, dtype=torch.float16)
    assert weight.zeros is not None
    read = from_awq(awq_words(codes.T), awq_words(weight.zeros.T), weight.scales.T.contiguous())
    assert_same(read, weight)


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_gptq(sizes: tuple[int, int, int], bits: int, is_symmetric: bool, is_v2: bool) -> None:
    weight, codes = random_weight(sizes, bits=bits, has_zeros=not is_symmetric, dtype=torch.float16)
    per_word = 32 // bits
    pieces = codes.view(sizes[0], -1, per_word)
    qweight = torch.stack([words_of(row, bits=bits) for row in pieces.transpose(0, 1).tolist()])
    assert qweight.shape == (sizes[1] * bits // 32, sizes[0])
    qzeros = None
    if weight.zeros is not None:
        stored = weight.zeros.T.to(torch.int64)
        # the first format: one less, where 0 wraps around to the largest code
        stored = stored if is_v2 else (stored - 1) % 2**bits
        qzeros = torch.stack([words_of(row, bits=bits) for row in stored.view(len(stored), -1, per_word).tolist()])
    assert_same(from_gptq(qweight, weight.scales.T.contiguous(), qzeros, bits=bits, is_v2=is_v2), weight)
