"""Norms against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops.backends import cpu_kernels
from qnext.ops.reference import norm as reference

from .compare import TOLERANCES, assert_close, assert_same_function, randn

EPS = 1e-6
native = cpu_kernels()
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (130, 48), (65, 3, 20)])
def test_rms_norm(dtype: torch.dtype, zero_centered: bool, shape: tuple[int, ...]) -> None:
    inputs = {"x": randn(*shape, seed=0, dtype=dtype, scale=3.0), "weight": randn(shape[-1], seed=1, dtype=dtype)}
    assert_same_function(
        lambda x, weight: (ops.rms_norm(x, weight, eps=EPS, zero_centered=zero_centered),),
        lambda x, weight: (reference.rms_norm(x, weight, eps=EPS, zero_centered=zero_centered),),
        inputs,
        tolerance=TOLERANCES[dtype],
    )


@pytest.mark.skipif(native is None, reason="needs the native kernels")
@pytest.mark.parametrize("isa", range(native.best_isa() + 1 if native else 0))
@pytest.mark.parametrize("shape", [(1, 16), (130, 3, 48), (2, 2048)])
def test_native_rms_norm_has_the_gradients_of_the_reference(isa: int, shape: tuple[int, ...]) -> None:
    """From strided rows too, and on any number of threads."""
    assert native is not None
    native.force_isa(isa)
    inputs = {name: randn(*n, seed=len(n), dtype=torch.float32) for name, n in (("x", shape), ("weight", shape[-1:]))}
    gradients = []
    try:
        for count in (1, 3):
            native.set_num_threads(count)
            for zero_centered in (True, False):
                assert_same_function(
                    lambda x, weight, z=zero_centered: (ops.rms_norm(x, weight, eps=EPS, zero_centered=z),),
                    lambda x, weight, z=zero_centered: (reference.rms_norm(x, weight, eps=EPS, zero_centered=z),),
                    inputs,
                    tolerance=2e-6,  # sums of up to 390 rows
                )
            x, weight = (torch.cat([n, n], dim=-1).requires_grad_() for n in inputs.values())
            y = ops.rms_norm(x.chunk(2, dim=-1)[1], weight.chunk(2)[1], eps=EPS, zero_centered=True)
            gradients.append(torch.autograd.grad(y.sin().sum(), (x, weight)))
    finally:
        native.set_num_threads(torch.get_num_threads())
        native.force_isa(native.best_isa())
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5), (64, 6, 12)])
def test_gated_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Normalise first, gate after; the scale is the weight and not one more."""
    inputs = {
        "x": randn(*shape, seed=0, dtype=dtype),
        "gate": randn(*shape, seed=2, dtype=dtype, scale=2.0),
        "weight": randn(shape[-1], seed=1, dtype=dtype),
    }
    assert_same_function(
        lambda x, gate, weight: (ops.gated_rms_norm(x, gate, weight, eps=EPS),),
        lambda x, gate, weight: (reference.gated_rms_norm(x, gate, weight, eps=EPS),),
        inputs,
        tolerance=TOLERANCES[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_norm(dtype: torch.dtype) -> None:
    """eps lies inside the sum, not inside a mean: rows of length 1e-3 show the difference."""
    for scale in (1.0, 1e-3 / 20**0.5):
        x = randn(65, 3, 20, seed=0, dtype=dtype, scale=scale)
        assert_same_function(
            lambda x: (ops.l2_norm(x),),
            lambda x: (reference.l2_norm(x),),
            {"x": x},
            tolerance=TOLERANCES[dtype],
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert ops.l2_norm(x).dtype == wide


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l2_norm", [ops.l2_norm, reference.l2_norm])
def test_l2_norm_of_a_zero_row_has_no_gradient(dtype: torch.dtype, l2_norm: Callable[[Tensor], Tensor]) -> None:
    x = randn(4, 6, seed=0, dtype=dtype)
    x[1] = 0.0
    x.requires_grad_()
    y = l2_norm(x)
    y.backward(torch.ones_like(y))
    assert (y[1] == 0).all()
    assert x.grad is not None
    assert (x.grad[1] == 0).all()
    assert (x.grad[[0, 2, 3]] != 0).any(-1).all()


def test_the_formulas() -> None:
    """Number by number: eps in a mean, eps in a sum, the scale as it is or one more, the gate after the norm."""
    x, gate, weight = [3.0, -4.0], [0.5, -2.0], [2.0, 0.25]
    tensors = (torch.tensor([numbers], dtype=torch.float64) for numbers in (x, gate, weight))
    x_1D, gate_1D, weight_1D = tensors
    rms, length = math.sqrt(12.5 + 0.1), math.sqrt(25 + 0.1)
    for zero_centered in (False, True):
        expected = [a / rms * (b + zero_centered) for a, b in zip(x, weight, strict=True)]
        actual = reference.rms_norm(x_1D, weight_1D[0], eps=0.1, zero_centered=zero_centered)
        assert actual[0].tolist() == pytest.approx(expected, rel=1e-14)
    gated = [b * a / rms * c / (1 + math.exp(-c)) for a, b, c in zip(x, weight, gate, strict=True)]
    assert reference.gated_rms_norm(x_1D, gate_1D, weight_1D[0], eps=0.1)[0].tolist() == pytest.approx(gated, rel=1e-14)
    assert reference.l2_norm(x_1D, eps=0.1)[0].tolist() == pytest.approx([a / length for a in x], rel=1e-14)


def test_gradients_by_finite_differences() -> None:
    x, gate, weight = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 2, 5), (3, 2, 5), (5,)]))
    for zero_centered in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, w, z=zero_centered: ops.rms_norm(x, w, eps=EPS, zero_centered=z), (x, weight)
        )
    assert torch.autograd.gradcheck(lambda x, z, w: ops.gated_rms_norm(x, z, w, eps=EPS), (x, gate, weight))
    assert torch.autograd.gradcheck(ops.l2_norm, (x,))


@pytest.mark.parametrize("frozen", ["x", "gate", "weight"])
def test_a_frozen_input_leaves_the_other_gradients_alone(frozen: str) -> None:
    def gradients(without: str) -> dict[str, Tensor | None]:
        inputs = {"x": randn(3, 4, seed=0), "gate": randn(3, 4, seed=1), "weight": randn(4, seed=2)}
        for name, tensor in inputs.items():
            tensor.requires_grad_(name != without)
        ops.gated_rms_norm(inputs["x"], inputs["gate"], inputs["weight"], eps=EPS).square().sum().backward()
        return {name: tensor.grad for name, tensor in inputs.items()}

    whole, partial = gradients(""), gradients(frozen)
    for name, grad in whole.items():
        assert grad is not None
        if name == frozen:
            assert partial[name] is None
        else:
            other = partial[name]
            assert other is not None
            assert torch.allclose(grad, other, rtol=1e-12)


def test_bf16_is_rounded_once_at_the_end() -> None:
    """A product of large norm and large weight keeps all its bits until the cast."""
    x, weight = (randn(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(50, 64), (64,)]))
    expected = reference.rms_norm(x.double(), weight.double(), eps=EPS, zero_centered=True).to(torch.bfloat16)
    actual = ops.rms_norm(x, weight, eps=EPS, zero_centered=True)
    assert (actual != expected).float().mean() < 0.002  # fp32 may fall on the other side of a tie


def test_extremes_stay_finite() -> None:
    for value in (0.0, 1e-30, 1e4, 3e38):
        x = torch.full((2, 8), value, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(8, requires_grad=True)
        if value < 1e18:  # the square of more overflows fp32
            ops.rms_norm(x, weight, eps=EPS, zero_centered=True).sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all(), value
    assert_close(
        ops.rms_norm(torch.full((1, 8), 1e4), torch.zeros(8), eps=EPS, zero_centered=True),
        torch.ones(1, 8),
        tolerance=1e-6,
    )
