"""The short convolution against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import Packing
from qnext.ops.reference.conv import causal_conv1d_silu as formula

from .compare import LENGTHS, RAGGED, TOLERANCES, assert_close, assert_same_function, randn


def definition(x: Tensor, weight: Tensor, lengths: list[int], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return tuple(formula(x, weight, packing=Packing(lengths), initial_state_NWC=state))  # type: ignore[return-value]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int) -> None:
    x, weight = randn(length, 5, seed=0), randn(5, 4, seed=1)
    assert_same_function(
        lambda x, weight: tuple(ops.causal_conv1d_silu(x, weight, packing=Packing([length]))),
        lambda x, weight: definition(x, weight, [length]),
        {"x": x, "weight": weight},
        tolerance=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 4, 5])
def test_packed_with_carried_state(dtype: torch.dtype, width: int) -> None:
    inputs = {
        "x": randn(sum(RAGGED), 6, seed=0, dtype=dtype),
        "weight": randn(6, width, seed=1, dtype=dtype),
        "state": randn(len(RAGGED), width - 1, 6, seed=2, dtype=dtype),
    }
    assert_same_function(
        lambda x, weight, state: tuple(
            ops.causal_conv1d_silu(x, weight, packing=Packing(RAGGED), initial_state_NWC=state)
        ),
        lambda x, weight, state: definition(x, weight, RAGGED, state),
        inputs,
        tolerance=TOLERANCES[dtype],
        # bf16 sums of products over all tokens are rounded on the way
        gradient_tolerance=3e-2 if dtype == torch.bfloat16 else 0.0,
    )


@pytest.mark.parametrize("cut", [1, 2, 3, 64])
def test_two_pieces_are_the_whole(cut: int) -> None:
    x, weight = randn(70, 5, seed=0), randn(5, 4, seed=1)
    whole = ops.causal_conv1d_silu(x, weight, packing=Packing([70]))
    first = ops.causal_conv1d_silu(x[:cut], weight, packing=Packing([cut]))
    second = ops.causal_conv1d_silu(x[cut:], weight, packing=Packing([70 - cut]), initial_state_NWC=first.state_NWC)
    assert_close(torch.cat([first.y_TC, second.y_TC]), whole.y_TC, tolerance=1e-14)
    assert torch.equal(second.state_NWC, whole.state_NWC)


def test_width_one_has_no_history() -> None:
    x, weight = randn(5, 3, seed=0), randn(3, 1, seed=1)
    out = ops.causal_conv1d_silu(x, weight, packing=Packing([2, 3]))
    assert_close(out.y_TC, torch.nn.functional.silu(x * weight[:, 0]), tolerance=1e-14)
    assert out.state_NWC.shape == (2, 0, 3)


def test_gradients_by_finite_differences() -> None:
    packing = Packing([1, 4, 2])
    inputs = (randn(7, 2, seed=0), randn(2, 3, seed=1), randn(3, 2, 2, seed=2))
    assert torch.autograd.gradcheck(
        lambda x, w, s: tuple(ops.causal_conv1d_silu(x, w, packing=packing, initial_state_NWC=s)),
        tuple(x.requires_grad_() for x in inputs),
    )
