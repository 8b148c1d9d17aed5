"""Codes and scales: against plain rounding, against the outputs they are to keep, and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext.ops import QuantizedWeight
from qnext.quant.rounding import round_calibrated, round_nearest
from qnext.quant.scheme import SCHEMES, QuantScheme

INT4 = SCHEMES["int4-g32"]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight: QuantizedWeight, original: Tensor, inputs: Tensor | None = None) -> float:
    difference = weight.dequantize() - original
    if inputs is not None:
        difference, original = difference @ inputs.T, original @ inputs.T
    return float(difference.norm() / original.norm())


def plain_error(original: Tensor, scheme: QuantScheme) -> float:
    """Scale from the largest magnitude, every code at its nearest."""
    groups = original.unflatten(-1, (-1, scheme.group_size))
    steps = 2 ** (scheme.bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / steps
    return float(((groups / scale).round() * scale - groups).norm() / original.norm())


def correlated_inputs(count: int, size: int, seed: int = 1) -> Tensor:
    """A few directions carry most of the power, and sizes of inputs differ."""
    return weights(count, size // 4, seed=seed) @ weights(size // 4, size, seed=seed + 1) + 0.1 * weights(
        count, size, seed=seed + 2
    ) * torch.linspace(0.1, 3.0, size)


@pytest.mark.parametrize("name", SCHEMES)
def test_searched_scales_beat_the_largest_magnitude(name: str) -> None:
    original = weights(24, 256)
    rounded = round_nearest(original, SCHEMES[name], scale_dtype=torch.bfloat16)
    assert rounded.shape == original.shape
    assert error(rounded, original) < 0.98 * plain_error(original, SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
def test_calibrated_codes_keep_outputs_better(name: str) -> None:
    original, inputs = weights(40, 256), correlated_inputs(600, 256)
    moment = inputs.T @ inputs / len(inputs)
    nearest = round_nearest(original, SCHEMES[name], scale_dtype=torch.bfloat16)
    calibrated = round_calibrated(original, moment, SCHEMES[name], scale_dtype=torch.bfloat16)
    unseen = correlated_inputs(600, 256, seed=1)[::2]
    assert error(calibrated, original, unseen) < 0.6 * error(nearest, original, unseen)


def test_inputs_without_correlation_leave_the_nearest_codes() -> None:
    original = weights(16, 96)
    nearest = round_nearest(original, INT4, scale_dtype=torch.float32)
    calibrated = round_calibrated(original, torch.eye(96), INT4, scale_dtype=torch.float32)
    assert torch.equal(nearest.codes, calibrated.codes)


@pytest.mark.parametrize("kind", ["zero", "rank one", "huge", "tiny"])
def test_degenerate_moments_are_survived(kind: str) -> None:
    original, size = weights(8, 64), 64
    moment = {
        "zero": torch.zeros(size, size),
        "rank one": torch.ones(size, size),
        "huge": torch.eye(size) * 1e30,
        "tiny": torch.eye(size) * 1e-30,
    }[kind]
    rounded = round_calibrated(original, moment, INT4, scale_dtype=torch.bfloat16)
    assert torch.isfinite(rounded.scales).all()
    assert error(rounded, original) < 0.5


def test_size_of_the_moment_does_not_matter() -> None:
    original, inputs = weights(12, 128), correlated_inputs(300, 128)
    moment = inputs.T @ inputs
    one, other = (
        round_calibrated(original, moment * factor, INT4, scale_dtype=torch.bfloat16) for factor in (1.0, 2.0**-20)
    )
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_codes_can_express_stays_exact(dtype: torch.dtype) -> None:
    """Already rounded weights come back as they are: rounding twice is rounding once."""
    first = round_nearest(weights(10, 128), INT4, scale_dtype=dtype).dequantize()
    again = round_nearest(first, INT4, scale_dtype=dtype).dequantize()
    assert float((again - first).norm() / first.norm()) < 2e-3  # a group whose extreme code is unused may move


def test_a_group_of_zeros_has_a_finite_scale() -> None:
    original = weights(3, 64)
    original[1, :32] = 0.0
    rounded = round_nearest(original, INT4, scale_dtype=torch.bfloat16)
    assert torch.equal(rounded.dequantize()[1, :32], torch.zeros(32))
    assert (rounded.scales != 0).all()


def test_important_inputs_are_rounded_better() -> None:
    original = weights(64, 32)
    importance = torch.ones(32)
    importance[:4] = 100.0
    even = round_nearest(original, INT4, scale_dtype=torch.float32)
    weighted = round_nearest(original, INT4, scale_dtype=torch.float32, importance_D=importance)
    assert error(weighted, original) > error(even, original)
    part = [(q.dequantize() - original)[:, :4].norm() for q in (weighted, even)]
    assert part[0] < 0.9 * part[1]


def test_the_extreme_may_have_either_sign() -> None:
    """Codes reach -8 and only +7; a negative scale puts a positive extreme on the longer side."""
    original = torch.linspace(-7.0, 8.0, 16).repeat(2)[None]
    rounded = round_nearest(original, INT4, scale_dtype=torch.float32)
    assert error(rounded, original) < 1e-6
    assert float(rounded.scales) == pytest.approx(-1.0)


@pytest.mark.parametrize("name", ["int4-g32", "int8-g64"])
def test_equals_compressed_tensors_own_decompression(name: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from qnext.quant.formats import compressed_tensors_of

    scheme = SCHEMES[name]
    rounded = round_nearest(weights(20, 192), scheme, scale_dtype=torch.float32)
    arguments = quantization.QuantizationArgs(
        num_bits=scheme.bits, group_size=scheme.group_size, strategy="group", symmetric=True
    )
    tensors = {key.removeprefix("x."): tensor for key, tensor in compressed_tensors_of("x", rounded).items()}
    described = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    theirs = compressors.PackedQuantizationCompressor.decompress(tensors, described)["weight"]
    assert torch.equal(theirs, rounded.dequantize())
