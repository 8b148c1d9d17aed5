"""Codes and scales: the definition against a loop that reads like it, the kernels against the definition in bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import QuantizedWeight, cpu, reference
from qnext.ops import torch as pytorch
from qnext.ops.backends import cpu_kernels
from qnext.ops.quantized import pack_codes

native = cpu_kernels()
needs_native = pytest.mark.skipif(native is None, reason="the native kernels are not built or not wanted")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DIVISORS = {4: [-9.6, -8.0, -7.25, 7.4, 7.0, 5.5, 0.0, 1e9, 1e-3], 8: [-128.0, 127.0]}
FORMS = [(bits, size) for bits in (4, 8) for size in (32, 64, 128)]


@pytest.fixture(params=range(native.best_isa() + 1 if native else 0))
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    native.force_isa(request.param)
    yield
    native.force_isa(native.best_isa())


def extreme_matrix(num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Rows of all the kinds that could break a search; the number of rows is no multiple of anything."""
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randn(37, num_inputs, generator=generator) * 0.02
    weight[0] = 0.0
    weight[1] *= 1e-38
    weight[2] *= 1e37
    weight[3, 5] = 1e4
    weight[4] *= 1e-30
    weight[5] = weight[5].sign()  # extremes of both signs
    weight[6] = (weight[6] * 1e3).round()
    weight[7] *= 1e-7  # below the normal numbers of fp16
    weight[8] = 3e4
    weight[9] = 1e-45
    weight[10] = torch.arange(num_inputs) % 17 - 8.0
    weight[11] = (torch.arange(num_inputs) % 16 - 7.5) * 2.0**-6  # every quotient of some scale is a tie
    weight[12] = -0.0
    weight[13] = 3e38
    weight[14, ::2] = 0.0
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype)


def as_float32(number: float) -> float:
    value: float = struct.unpack("f", struct.pack("f", number))[0]
    return value


def plain_sum(numbers: Sequence[float]) -> float:
    """Sixteen sums side by side, then halves."""
    lanes = list(numbers[:16])
    for start in range(16, len(numbers), 16):
        lanes = [as_float32(a + b) for a, b in zip(lanes, numbers[start : start + 16], strict=True)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [as_float32(a + b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


def plain_group(group: list[float], divisors: Sequence[float], bits: int) -> tuple[float, list[int]]:
    """Scale in fp32 and codes of one group, number by number: fp64 holds sums and products of fp32 exactly enough."""
    zero = 2 ** (bits - 1)
    extreme = next(x for x in group if abs(x) == max(map(abs, group)))

    def steps_of(quotients: list[float]) -> list[int]:
        return [min(max(round(quotient), -zero), zero - 1) for quotient in quotients]

    def quotients_by(scale: float) -> list[float]:
        return [as_float32(x * as_float32(1.0 / scale)) for x in group]

    def error_of(scale: float) -> float:
        quotients = quotients_by(scale)
        gaps = [as_float32(step - quotient) for step, quotient in zip(steps_of(quotients), quotients, strict=True)]
        return as_float32(plain_sum([as_float32(gap * gap) for gap in gaps]) * as_float32(scale * scale))

    best, least = 1.0, math.inf
    for divisor in divisors:
        scale = as_float32(extreme / as_float32(divisor)) if divisor else 1.0
        if error_of(scale) < least:
            best, least = scale, error_of(scale)
    steps = steps_of(quotients_by(best))
    fit = as_float32(
        plain_sum([as_float32(s * x) for s, x in zip(steps, group, strict=True)]) / plain_sum([s * s for s in steps])
    )
    best = fit if error_of(fit) < least else best
    return best, [step + zero for step in steps_of([as_float32(x / best) for x in group])]


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_definition_is_the_loop(bits: int, group_size: int) -> None:
    weight = torch.randn(3, 2 * group_size, generator=torch.Generator().manual_seed(bits))
    rounded = reference.round_to_groups(
        weight, None, divisors=DIVISORS[bits], bits=bits, group_size=group_size, scale_dtype=torch.float32
    )
    for row in range(3):
        for group in range(2):
            numbers = weight[row, group * group_size :][:group_size].tolist()
            scale, codes = plain_group(numbers, DIVISORS[bits], bits)
            packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits=bits)
            assert rounded.scales[row, group].item() == scale
            assert torch.equal(rounded.codes[row].view(2, -1)[group], packed)


@pytest.mark.parametrize("num_rows", [1, 255, 600])
def test_torch_gives_the_bits_of_the_definition_some_rows_at_a_time(num_rows: int) -> None:
    weight = torch.randn(num_rows, 1024, generator=torch.Generator().manual_seed(3)).bfloat16()
    form = {"divisors": DIVISORS[4], "bits": 4, "group_size": 32, "scale_dtype": torch.bfloat16}
    expected, actual = (backend.round_to_groups(weight, **form) for backend in (reference, pytorch))
    assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scales, expected.scales)
    squares = [backend.rounding_errors(weight, expected) for backend in (reference, pytorch)]
    torch.testing.assert_close(*squares, rtol=1e-12, atol=0.0)


@needs_native
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_kernels_give_the_bits_of_the_definition(
    isa: None, bits: int, group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype, is_weighted: bool
) -> None:
    weight = extreme_matrix(3 * 128, dtype)
    importance = torch.rand(3 * 128, generator=torch.Generator().manual_seed(2)).square() * 100
    importance[::7] = 0.0
    weights = importance if is_weighted else None
    form = {"divisors": DIVISORS[bits], "bits": bits, "group_size": group_size, "scale_dtype": scale_dtype}
    assert cpu.serves_round_to_groups(weight, weights, **form)
    expected = reference.round_to_groups(weight, weights, **form)
    actual = cpu.round_to_groups(weight, weights, **form)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.scales, expected.scales)
    assert expected.scales.isfinite().all() and (expected.scales != 0).all()
    # Sums of squares of numbers of one sign, in another order: each addition in fp32 is off by 2^-24 at most.
    ours = cpu.rounding_errors(weight, actual)
    torch.testing.assert_close(ours, reference.rounding_errors(weight, expected), rtol=2e-5, atol=0.0)


@needs_native
@pytest.mark.parametrize("num_inputs", [32, 96, 32 * 9, 32 * 17])
def test_rows_of_any_number_of_groups_on_any_number_of_threads(isa: None, num_inputs: int) -> None:
    weight = extreme_matrix(num_inputs, torch.bfloat16).repeat(60, 1)[3:]
    form = {"divisors": DIVISORS[4], "bits": 4, "group_size": 32, "scale_dtype": torch.bfloat16}
    expected = reference.round_to_groups(weight, None, **form)
    was = native.num_threads()
    for threads in (1, 3):
        native.set_num_threads(threads)
        actual = cpu.round_to_groups(weight, None, **form)
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.scales, expected.scales)
    native.set_num_threads(was)


@needs_native
@pytest.mark.parametrize(("shape", "group_size"), [((4, 80), 16), ((4, 96), 64), ((2, 4, 64), 32)])
def test_what_the_kernels_do_not_take(shape: tuple[int, ...], group_size: int) -> None:
    form = {"divisors": DIVISORS[4], "bits": 4, "scale_dtype": torch.float32}
    assert not cpu.serves_round_to_groups(torch.randn(shape), group_size=group_size, **form)
    assert not cpu.serves_round_to_groups(torch.randn(shape).double(), group_size=32, **form)
    assert not cpu.serves_round_to_groups(torch.randn(64, 4).t(), group_size=32, **form)


def test_columns_and_other_groups_are_rounded_too() -> None:
    """What the kernels do not take goes to the definition."""
    weight = torch.randn(80, 48)
    form = {"divisors": DIVISORS[4], "bits": 4, "scale_dtype": torch.float32}
    turned = ops.round_to_groups(weight.t(), group_size=16, **form)
    assert turned.shape == (48, 80)
    gap = turned.dequantize() - weight.t()
    assert float(gap.norm() / weight.norm()) < 0.1
    squares = ops.rounding_errors(weight.t(), turned).sum(0)
    assert float(squares[0]) == pytest.approx(float(gap.double().square().sum()), rel=1e-6)


def test_errors_are_those_of_the_values(isa: None) -> None:
    """Of a weight with zeros too, which no kernel knows."""
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    rounded = ops.round_to_groups(weight, divisors=[7.0], bits=4, group_size=32, scale_dtype=torch.float16)
    zeros = torch.randint(0, 16, (9, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for form in (rounded, QuantizedWeight(rounded.codes, rounded.scales, 4, 32, zeros)):
        gaps = form.dequantize().double() - weight.double()
        expected = torch.stack([gaps.square().sum(-1), weight.double().square().sum(-1)], dim=-1)
        torch.testing.assert_close(ops.rounding_errors(weight, form), expected, rtol=1e-5, atol=0.0)
