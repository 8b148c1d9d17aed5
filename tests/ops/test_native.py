"""Native kernels against the reference, on every instruction set that this CPU has, and their batch invariance."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import reference
from qnext.ops.backends import cpu_kernels
from qnext.ops.cpu.panels import PanelWeight
from qnext.ops.quantized import pack_codes

native = cpu_kernels()
pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built or not wanted")

ROWS = [1, 2, 5, 6, 7, 13, 40]
# Rounding to int8 per group of 32 to 128 normal numbers costs 0.5 to 0.8 % of their size, to bf16 0.17 %.
TOLERANCE_INT8, TOLERANCE_BF16, TOLERANCE_FP32 = 1.2e-2, 3e-3, 1e-6


@pytest.fixture(autouse=True, params=range(native.best_isa() + 1 if native else 0))
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    native.force_isa(request.param)
    with torch.inference_mode():
        yield
    native.force_isa(native.best_isa())


def random_quantized(
    *shape: int, bits: int, group: int, scale: torch.dtype = torch.bfloat16, zeros: bool = False, seed: int = 0
) -> ops.QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    groups = (*shape[:-1], shape[-1] // group)
    scales = (torch.rand(groups, generator=generator) * 0.01 + 0.001).to(scale)
    zero_codes = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator) if zeros else None
    return ops.QuantizedWeight(pack_codes(codes, bits=bits), scales, bits, group, zero_codes)


def as_panels(weight: ops.QuantizedWeight) -> PanelWeight:
    panels = ops.empty_quantized(
        tuple(weight.shape),
        bits=weight.bits,
        group_size=weight.group_size,
        scale_dtype=weight.scales.dtype,
        has_zeros=weight.zeros is not None,
    )
    assert isinstance(panels, PanelWeight)
    if len(weight.shape) == 2:
        ops.write_quantized(panels, weight)
    else:
        half = weight.shape[1] // 2
        for expert in range(weight.shape[0]):
            for row in (0, half):
                one = weight[expert]
                zeros = None if one.zeros is None else one.zeros[row : row + half]
                part = ops.QuantizedWeight(
                    one.codes[row : row + half], one.scales[row : row + half], one.bits, one.group_size, zeros
                )
                ops.write_quantized(panels, part, expert=expert, row=row)
    return panels


def random_rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 128, 256])
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("num_outputs", [16, 100])
def test_panels_hold_what_was_written(bits: int, group: int, scale: torch.dtype, zeros: bool, num_outputs: int) -> None:
    weight = random_quantized(num_outputs, 256, bits=bits, group=group, scale=scale, zeros=zeros)
    panels = as_panels(weight)
    read = panels.to_quantized()
    assert torch.equal(read.codes, weight.codes) and torch.equal(read.scales, weight.scales)
    assert zeros == (read.zeros is not None) and (not zeros or torch.equal(read.zeros, weight.zeros))
    x_TD = random_rows(7, 256)
    assert relative_rms(ops.linear(x_TD, panels), x_TD @ weight.dequantize().t()) < TOLERANCE_INT8


@pytest.mark.parametrize("zeros", [False, True])
def test_stacked_panels_hold_what_was_written(zeros: bool) -> None:
    weight = random_quantized(3, 64, 96, bits=4, group=32, zeros=zeros)
    read = as_panels(weight).to_quantized()
    assert torch.equal(read.codes, weight.codes) and torch.equal(read.scales, weight.scales)
    assert torch.equal(ops.dequantize(read, torch.float32), weight.dequantize())


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_integer_products_are_exact(num_rows: int, bits: int, group: int) -> None:
    """Rows of small integers with 127 in every group survive the rounding to int8: nothing else may be lost."""
    weight = random_quantized(72, 128, bits=bits, group=group, scale=torch.float32)
    weight.scales.fill_(0.25)
    x_TD = torch.randint(-127, 128, (num_rows, 128), generator=torch.Generator().manual_seed(2)).float()
    x_TD[:, ::32] = 127.0
    expected = x_TD.double() @ weight.dequantize(torch.float64).t()
    assert torch.equal(ops.linear(x_TD, as_panels(weight)).double(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 48, 96])
@pytest.mark.parametrize("zeros", [False, True])
def test_every_number_of_rows_and_many_tasks(bits: int, group: int, zeros: bool) -> None:
    """Groups that are no multiple of 32, a last panel of eight outputs, and more outputs than a task takes."""
    weight = random_quantized(1000, 96, bits=bits, group=group, scale=torch.float32, zeros=zeros)
    weight.scales.fill_(0.25)
    panels, value_FD = as_panels(weight), weight.dequantize(torch.float64)
    x_TD = torch.randint(-127, 128, (34, 96), generator=torch.Generator().manual_seed(2)).float()
    x_TD[:, ::16] = 127.0
    expected = x_TD.double() @ value_FD.t()
    for num_rows in range(1, 35):
        assert torch.equal(ops.linear(x_TD[:num_rows], panels).double(), expected[:num_rows]), num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_outputs", [1, 8, 77])
@pytest.mark.parametrize("num_rows", ROWS)
def test_float_weights(dtype: torch.dtype, num_outputs: int, num_rows: int) -> None:
    weight_FD = random_rows(num_outputs, 192, seed=3).to(dtype)
    x_TD = random_rows(num_rows, 192)
    y_TF = ops.linear(x_TD, weight_FD)
    tolerance = TOLERANCE_FP32 if dtype == torch.float32 else TOLERANCE_BF16
    assert relative_rms(y_TF, x_TD @ weight_FD.float().t()) < tolerance


def weights_of(form: str, *shape: int, seed: int = 0) -> tuple[Tensor | ops.Weight, Tensor]:
    """A weight in one of the forms, and what it stands for."""
    if form in ("fp32", "bf16"):
        weight = random_rows(*shape, seed=seed).mul_(0.1).to(torch.float32 if form == "fp32" else torch.bfloat16)
        return weight, weight.float()
    quantized = random_quantized(*shape, bits=4 if form == "int4" else 8, group=32, seed=seed)
    return as_panels(quantized), quantized.dequantize()


@pytest.mark.parametrize("form", ["fp32", "bf16", "int4", "int8"])
def test_a_row_does_not_depend_on_its_company(form: str) -> None:
    weight, _ = weights_of(form, 80, 256)
    x_TD = random_rows(40, 256)
    whole = ops.linear(x_TD, weight)
    for size in (1, 2, 3, 4, 5, 6, 8, 13, 16, 32, 33, 39):
        assert torch.equal(torch.cat([ops.linear(part, weight) for part in x_TD.split(size)]), whole)


class Experts(NamedTuple):
    gate_up: Tensor | ops.Weight
    down: Tensor | ops.Weight
    shared: ops.SharedExpert | None


NUM_EXPERTS, WIDTH, HIDDEN = 8, 64, 128


def make_experts(form: str, has_shared: bool) -> tuple[Experts, Experts]:
    """In one of the forms, and what they stand for."""
    parts = [
        weights_of(form, NUM_EXPERTS, 2 * WIDTH, HIDDEN, seed=1),
        weights_of(form, NUM_EXPERTS, HIDDEN, WIDTH, seed=2),
    ]
    if not has_shared:
        return tuple(Experts(gate_up, down, None) for gate_up, down in zip(*parts, strict=True))
    # in another form than the routed ones, and of another width
    other = "int8" if form == "int4" else form
    parts += [weights_of(other, *s, seed=i) for i, s in enumerate([(96, HIDDEN), (96, HIDDEN), (HIDDEN, 96)])]
    gate = random_rows(1, HIDDEN, seed=9).to(torch.bfloat16)
    stored, values = ([part[place] for part in parts] for place in (0, 1))
    return (
        Experts(*stored[:2], ops.SharedExpert(*stored[2:], gate)),
        Experts(*values[:2], ops.SharedExpert(*values[2:], gate.float())),
    )


@cache
def rows_of_experts(form: str, has_shared: bool) -> tuple[Tensor, ops.Routing, Tensor]:
    """Inputs, their experts and what the reference makes of them, once for all instruction sets."""
    gate_up, down, shared = make_experts(form, has_shared)[1]
    x_TD = random_rows(1100, HIDDEN)
    routing = reference.route(random_rows(1100, NUM_EXPERTS, seed=4), top_k=3, norm_topk_prob=True)
    return x_TD, routing, reference.experts_swiglu(x_TD, gate_up, down, routing=routing, shared=shared)


@pytest.mark.parametrize("form", ["fp32", "bf16", "int4", "int8"])
@pytest.mark.parametrize("has_shared", [False, True])
def test_experts(form: str, has_shared: bool) -> None:
    gate_up, down, shared = make_experts(form, has_shared)[0]
    x_TD, routing, expected = rows_of_experts(form, has_shared)
    y_TD = ops.experts_swiglu(x_TD, gate_up, down, routing=routing, shared=shared)
    tolerance = {"fp32": 2e-6, "bf16": 3 * TOLERANCE_BF16}.get(form, 3 * TOLERANCE_INT8)  # three roundings
    assert relative_rms(y_TD, expected) < tolerance
    for rows in (slice(0, 1), slice(3, 5), slice(20, 61), slice(1000, 1100)):
        part = ops.Routing(routing.weights_TA[rows], routing.experts_TA[rows])
        assert torch.equal(ops.experts_swiglu(x_TD[rows], gate_up, down, routing=part, shared=shared), y_TD[rows])


def test_an_expert_that_is_none_is_refused() -> None:
    gate_up, down = random_rows(4, 64, 32), random_rows(4, 32, 32)
    for bad in (-1, 4, 2**40):
        routing = ops.Routing(torch.ones(2, 1), torch.tensor([[0], [bad]]))
        with pytest.raises(IndexError, match="0 to 3"):
            ops.experts_swiglu(random_rows(2, 32), gate_up, down, routing=routing)


@pytest.mark.parametrize("size", [1, 15, 1024, 1025, 5000])
def test_argmax(size: int) -> None:
    rows_RY = torch.randint(0, 40, (9, size), generator=torch.Generator().manual_seed(size)).float()  # many are equal
    rows_RY[3] = float("-inf")
    out_R = torch.full((9,), -1)
    ops.argmax(rows_RY, out_R)
    assert out_R.tolist() == [row.index(max(row)) for row in rows_RY.tolist()]


def test_argmax_of_nan_stays_in_range() -> None:
    rows_RY = random_rows(2, 2000)
    rows_RY[0, 1500] = rows_RY[1, 0] = float("nan")
    out_R = torch.full((2,), -1)
    ops.argmax(rows_RY, out_R)
    assert all(0 <= place < 2000 for place in out_R.tolist())


def test_rows_are_put_where_they_belong() -> None:
    table_ND, rows_TD = random_rows(7, 24), random_rows(3, 24, seed=1)
    expected = table_ND.clone()
    expected[[5, 0, 6]] = rows_TD
    ops.put_rows(rows_TD, torch.tensor([5, 0, 6]), table_ND)
    assert torch.equal(table_ND, expected)
    for bad in (-1, 7):
        with pytest.raises(IndexError, match="0 to 6"):
            ops.put_rows(rows_TD, torch.tensor([1, bad, 2]), table_ND)
    assert torch.equal(table_ND, expected), "nothing is written then"


def test_concat() -> None:
    a_TD, b_TD = random_rows(5, 24), random_rows(5, 24, seed=1)
    assert torch.equal(ops.concat(a_TD, b_TD), torch.cat([a_TD, b_TD], dim=-1))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_experts, top_k", [(512, 10), (5, 5), (7, 1)])
def test_route(num_experts: int, top_k: int, renormalize: bool) -> None:
    logits_TE = random_rows(50, num_experts)
    weights_TA, experts_TA = ops.route(logits_TE, top_k=top_k, norm_topk_prob=renormalize)
    expected = reference.route(logits_TE, top_k=top_k, norm_topk_prob=renormalize)
    assert torch.equal(experts_TA, expected.experts_TA)
    torch.testing.assert_close(weights_TA, expected.weights_TA, rtol=1e-5, atol=0.0)


def test_route_of_nan_stays_in_range() -> None:
    logits_TE = random_rows(2, 8)
    logits_TE[0, 3] = float("nan")
    logits_TE[1] = float("nan")
    weights_TA, experts_TA = ops.route(logits_TE, top_k=3, norm_topk_prob=True)
    assert weights_TA.isnan().all() and ((experts_TA >= 0) & (experts_TA < 8)).all()


@pytest.mark.parametrize("form", ["fp32", "bf16", "int4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows(form: str, bad: float) -> None:
    weight, _ = weights_of(form, 32, 64)
    x_TD = random_rows(3, 64)
    x_TD[1, 5] = bad
    y_TF = ops.linear(x_TD, weight)
    assert not y_TF[1].isfinite().any() and y_TF[[0, 2]].isfinite().all()


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm(zero_centered: bool) -> None:
    x, weight = random_rows(3, 37, 64), random_rows(64, seed=2).to(torch.bfloat16)
    y = ops.rms_norm(x, weight, eps=1e-6, zero_centered=zero_centered)
    expected = reference.rms_norm(x, weight, eps=1e-6, zero_centered=zero_centered)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(ops.rms_norm(x[1, 3:4], weight, eps=1e-6, zero_centered=zero_centered), y[1, 3:4])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_nothing(num_threads: int) -> None:
    weight, _ = weights_of("int4", 640, 256)
    x_TD = random_rows(9, 256)
    before, expected = native.num_threads(), ops.linear(x_TD, weight)
    try:
        native.set_num_threads(num_threads)
        assert native.num_threads() == num_threads
        assert all(torch.equal(ops.linear(x_TD, weight), expected) for _ in range(20))
    finally:
        native.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 7, 16, 31, 1000, (1 << 18) + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_looked_at(dtype: torch.dtype, count: int) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, 0.0, -0.0, limits.smallest_normal / 4]).to(dtype)
    numbers = numbers.repeat(count // 5 + 1)[:count]
    assert ops.are_finite(numbers)
    for place in {0, count // 2, count - 1} if count else ():
        for bad in (torch.inf, -torch.inf, torch.nan):
            spoilt = numbers.clone()
            spoilt[place] = bad
            assert not ops.are_finite(spoilt)
    assert ops.are_finite(torch.arange(count)) and ops.are_finite(numbers.repeat(2).view(2, count).t())


def test_a_thread_that_computes_alone_does_all_of_its_work() -> None:
    """Of the time that the process spends: with the pool it is a part."""
    weight = torch.randn(2048, 1024)
    form = {"divisors": [-8.0, 7.0], "bits": 4, "group_size": 32, "scale_dtype": torch.bfloat16}
    shares = []

    def alone() -> None:
        ops.compute_alone()
        own, all_of_them = time.thread_time(), time.process_time()
        for _ in range(10):
            ops.round_to_groups(weight, **form)
        shares.append((time.thread_time() - own) / (time.process_time() - all_of_them))

    before, torch_before = native.num_threads(), torch.get_num_threads()
    native.set_num_threads(3)
    try:
        thread = threading.Thread(target=alone)
        thread.start()
        thread.join()
    finally:
        native.set_num_threads(before)
        torch.set_num_threads(torch_before)
    assert shares[0] > 0.9
