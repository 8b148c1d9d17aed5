"""Floats of few bits against compressed-tensors' own compressors, and codes of odd widths against its packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.quant.float_formats import from_bitsandbytes, from_fp4, from_fp8, scale_values
from qnext.quant.formats import dequantize_ordered, from_gptq, from_int_quantized, from_pack_quantized, unpack_codes

from .theirs import module_of_theirs, pack_to_int32, unpack_from_int32

WEIGHT = torch.randn(24, 96, generator=torch.Generator().manual_seed(5)) * 0.05


def compress(form: str, arguments: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What their compressor writes of WEIGHT, and what their decompressor makes of it."""
    module_of_theirs("compressors.nvfp4")  # older ones know fewer forms
    registry, quantization = module_of_theirs("compressors.base"), module_of_theirs("quantization")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**arguments))
    compressor = registry.BaseCompressor.get_value_from_registry(form)
    tensors = compressor.compress({"weight": WEIGHT, **state}, scheme)
    return tensors, compressor.decompress(dict(tensors), scheme)["weight"]


FP8: dict[str, tuple[dict[str, Any], Any, tuple[int, int]]] = {
    "tensor": ({"strategy": "tensor"}, lambda w: w.abs().max().reshape(1), (0, 0)),
    "channel": ({"strategy": "channel"}, lambda w: w.abs().amax(1, keepdim=True), (1, 0)),
    "group": ({"strategy": "group", "group_size": 16}, lambda w: w.view(24, 6, 16).abs().amax(-1), (1, 16)),
    "block": (
        {"strategy": "block", "block_structure": [8, 32]},
        lambda w: w.view(3, 8, 3, 32).abs().amax((1, 3)),
        (8, 32),
    ),
}


@pytest.mark.parametrize("strategy", FP8)
def test_fp8_is_theirs(strategy: str) -> None:
    arguments, maxima, block = FP8[strategy]
    tensors, theirs = compress(
        "float-quantized", {"num_bits": 8, "type": "float", **arguments}, {"weight_scale": maxima(WEIGHT) / 448}
    )
    ours = from_fp8(tensors["weight"], tensors["weight_scale"], block=block, dtype=torch.float32)
    assert torch.equal(ours, theirs)
    assert (ours - WEIGHT).abs().max() < 0.01


@pytest.mark.parametrize("sizes", [(24, 96), (3, 5), (130, 257), (1, 300)])
@pytest.mark.parametrize("block", [(0, 0), (1, 0), (128, 128), (64, 128), (1, 32), (200, 7)])
def test_fp8_blocks_of_any_size_are_the_formula(sizes: tuple[int, int], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(sizes, generator=generator).to(torch.float8_e4m3fn)
    rows, columns = block[0] or sizes[0], block[1] or sizes[1]
    scales = torch.rand(-(-sizes[0] // rows), -(-sizes[1] // columns), generator=generator)
    expected = weight.float() * torch.kron(scales, torch.ones(rows, columns))[: sizes[0], : sizes[1]]
    assert torch.equal(from_fp8(weight, scales, block=block, dtype=torch.float32), expected)
    assert torch.equal(from_fp8(weight, scales, block=block, dtype=torch.bfloat16), expected.bfloat16())


def test_mxfp8_is_theirs() -> None:
    powers = torch.exp2(torch.floor(torch.log2(WEIGHT.view(24, 3, 32).abs().amax(-1)))) / 256
    arguments = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    tensors, theirs = compress("mxfp8-quantized", arguments, {"weight_scale": powers})
    ours = from_fp8(tensors["weight"], tensors["weight_scale"], block=(1, 32), dtype=torch.bfloat16)
    assert torch.equal(ours, theirs)


def test_nvfp4_is_theirs() -> None:
    """Their decompressor computes in bfloat16 after dividing in fp32; ours is the same rounded once."""
    factor = (6 * 448 / WEIGHT.abs().max()).reshape(1)
    scales = (WEIGHT.view(24, 6, 16).abs().amax(-1) / 6 * factor).to(torch.float8_e4m3fn)
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    tensors, theirs = compress(
        "nvfp4-pack-quantized", arguments, {"weight_scale": scales.float(), "weight_global_scale": factor}
    )
    ours = from_fp4(
        tensors["weight_packed"], tensors["weight_scale"], divisor=tensors["weight_global_scale"], dtype=torch.float32
    )
    torch.testing.assert_close(ours.bfloat16(), theirs, rtol=2**-7, atol=0)
    assert (ours - WEIGHT).abs().max() < 0.03
    as_factor = from_fp4(tensors["weight_packed"], tensors["weight_scale"], factor=1 / factor, dtype=torch.float32)
    torch.testing.assert_close(as_factor, ours, rtol=1e-6, atol=0)


def test_mxfp4_is_theirs() -> None:
    powers = torch.exp2(torch.floor(torch.log2(WEIGHT.view(24, 3, 32).abs().amax(-1))) - 2)
    arguments = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    tensors, theirs = compress("mxfp4-pack-quantized", arguments, {"weight_scale": powers})
    assert torch.equal(from_fp4(tensors["weight_packed"], tensors["weight_scale"], dtype=torch.bfloat16), theirs)


def test_a_group_of_zeros() -> None:
    scales = torch.zeros(2, 3, dtype=torch.float8_e4m3fn)
    values = from_fp4(torch.full((2, 24), 0x77, dtype=torch.uint8), scales, divisor=torch.ones(1), dtype=torch.float32)
    assert torch.equal(values, torch.zeros(2, 48))


def test_powers_of_two() -> None:
    exponents = torch.tensor([0, 1, 126, 127, 128, 254], dtype=torch.uint8)
    assert scale_values(exponents).tolist() == [2.0 ** (int(e) - 127) for e in exponents]
    assert not torch.isfinite(scale_values(torch.tensor([255], dtype=torch.uint8))).any()


@pytest.mark.parametrize("shape", [(4, 64), (3, 50), (1, 2), (40, 96)])
def test_bitsandbytes_is_the_formula(shape: tuple[int, int]) -> None:
    """Written out number by number; the last block may be cut anywhere."""
    generator = torch.Generator().manual_seed(1)
    count, block_size = shape[0] * shape[1], 64
    codes = torch.randint(0, 16, (count,), generator=generator)
    table, maxima = torch.randn(16, generator=generator), torch.rand(-(-count // block_size), generator=generator)
    packed = torch.tensor([int(codes[i]) * 16 + int(codes[i + 1]) for i in range(0, count, 2)], dtype=torch.uint8)
    expected = torch.stack([table[codes[i]] * maxima[i // block_size] for i in range(count)]).view(shape)
    ours = from_bitsandbytes(
        packed[:, None], maxima, table, shape=shape, block_size=block_size, nested=None, dtype=torch.float32
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("count", [1, 10, 32, 33, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_codes_of_any_width(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (5, count), generator=torch.Generator().manual_seed(bits))
    words = pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(unpack_codes(words, count=count, bits=bits).to(torch.int64), codes)
    theirs = unpack_from_int32(words, bits, torch.Size(codes.shape)).to(torch.int64)
    assert torch.equal(theirs + 2 ** (bits - 1), codes)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_odd_widths_are_widened_without_loss(bits: int, is_symmetric: bool) -> None:
    half = 2 ** (bits - 1)
    state = {"weight_scale": WEIGHT.view(24, 3, 32).abs().amax(-1) / half}
    if not is_symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, (24, 3)).to(torch.int8)
    arguments = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": is_symmetric}
    tensors, theirs = compress("pack-quantized", arguments, state)
    ours = from_pack_quantized(
        tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"), num_inputs=96, bits=bits
    )
    assert ours.bits == (4 if bits < 4 else 8)
    assert torch.equal(ours.dequantize(), theirs)


@pytest.mark.parametrize("is_v2", [True, False])
def test_gptq_of_three_bits(is_v2: bool) -> None:
    """GPTQ's three words for 32 codes are one stream of bits, along the inputs, as pack_to_int32 writes it."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 8, (32, 96), generator=generator)
    zeros = torch.randint(0, 8, (3, 32), generator=generator)
    scales = torch.rand(3, 32, generator=generator)
    stored = zeros if is_v2 else (zeros - 1) % 8
    qweight = pack_to_int32((codes - 4).to(torch.int8), 3).T.contiguous()
    qzeros = pack_to_int32((stored - 4).to(torch.int8), 3)
    assert (qweight.shape, qzeros.shape) == ((9, 32), (3, 3))
    weight = from_gptq(qweight, scales, qzeros, bits=3, is_v2=is_v2)
    wide = [each.T.repeat_interleave(32, dim=1) for each in (zeros, scales)]
    assert torch.equal(weight.dequantize(), (codes - wide[0]).float() * wide[1])


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_is_theirs(strategy: str) -> None:
    maxima = WEIGHT.abs().amax(1, keepdim=True) if strategy == "channel" else WEIGHT.abs().max().reshape(1)
    tensors, theirs = compress(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": strategy}, {"weight_scale": maxima / 127}
    )
    scales = tensors["weight_scale"].reshape(-1, 1).expand(24, 1)
    assert torch.equal(from_int_quantized(tensors["weight"], scales, bits=8).dequantize(), theirs)


@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order_is_the_formula(bits: int, has_zeros: bool) -> None:
    """Sorting columns by group, packing them, and reading with the index gives the columns in their own order."""
    generator = torch.Generator().manual_seed(bits)
    signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 64), generator=generator).to(torch.int8)
    scales = torch.rand(6, 4, generator=generator)
    zeros = torch.randint(-3, 4, (6, 4), generator=generator).to(torch.int8) if has_zeros else None
    index = torch.randperm(64, generator=generator) // 16
    weight = from_int_quantized(signed, scales, zeros, bits=bits)
    shift = 0.0 if zeros is None else zeros.float()[:, index]
    expected = (signed.float() - shift) * scales[:, index]
    assert torch.equal(dequantize_ordered(weight, index.to(torch.int32), dtype=torch.float32), expected)
