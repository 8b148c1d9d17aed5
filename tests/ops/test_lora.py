"""Frozen weights and low-rank changes against the formula, which adds the changes to the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import ExpertsLora, LowRank, Routing, Weight, reference
from qnext.quant.rounding import round_nearest
from qnext.quant.scheme import find_scheme

from .compare import TOLERANCES, assert_same_function, randn
from .test_moe import choose

RANK = 3
# tokens, hidden, width, experts, top k, only these experts get tokens, places of the experts' parts
CASES: dict[str, tuple[int, int, int, int, int, list[int] | None, list[int] | None]] = {
    "all experts": (65, 16, 8, 6, 2, None, None),
    "odd sizes": (40, 11, 7, 5, 3, None, None),
    "some experts": (65, 16, 8, 6, 2, None, [-1, 0, -1, 1, 2, -1]),
    "some experts, some without tokens": (30, 16, 8, 6, 2, [0, 1, 4], [-1, 0, -1, 1, 2, -1]),
    "no token at an expert with parts": (30, 16, 8, 6, 2, [0, 2, 5], [-1, 0, -1, 1, 2, -1]),
    "one expert": (10, 16, 8, 1, 1, None, None),
    "one token": (1, 16, 8, 6, 2, None, None),
}


def make_inputs(case: str, dtype: torch.dtype, *, is_shared: bool) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    num_tokens, hidden, width, num_experts, top_k, only, places = CASES[case]
    num_parts = num_experts if places is None else max(places) + 1
    shared = 1 if is_shared else num_parts
    inputs = {
        "x": randn(num_tokens, hidden, seed=0, dtype=dtype),
        "weights": randn(num_tokens, top_k, seed=3, dtype=torch.promote_types(dtype, torch.float32)).sigmoid(),
        "gate_up_A": randn(shared, RANK, hidden, seed=4, dtype=dtype, scale=hidden**-0.5),
        "gate_up_B": randn(num_parts, 2 * width, RANK, seed=5, dtype=dtype),
        "down_A": randn(num_parts, RANK, width, seed=6, dtype=dtype, scale=width**-0.5),
        "down_B": randn(shared, hidden, RANK, seed=7, dtype=dtype),
    }
    return inputs, choose(num_tokens, num_experts, top_k, only), None if places is None else torch.tensor(places)


def weights_of(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _, hidden, width, num_experts, *_ = CASES[case]
    gate_up = randn(num_experts, 2 * width, hidden, seed=1, dtype=dtype, scale=hidden**-0.5)
    return gate_up, randn(num_experts, hidden, width, seed=2, dtype=dtype, scale=width**-0.5)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", list(CASES))
def test_experts(case: str, dtype: torch.dtype, is_shared: bool) -> None:
    inputs, experts, places_E = make_inputs(case, dtype, is_shared=is_shared)
    weights = weights_of(case, dtype)

    def run(module: Any, x: Tensor, weights_TA: Tensor, *factors: Tensor) -> tuple[Tensor]:
        gate_up, down = (each.to(torch.float64) if module is reference else each for each in weights)
        lora = ExpertsLora(LowRank(*factors[:2], 0.5), LowRank(*factors[2:], 1.5), places_E)
        return (module.lora_experts_swiglu(x, gate_up, down, lora, routing=Routing(weights_TA, experts)),)

    assert_same_function(
        lambda **given: run(ops, *given.values()),
        lambda **given: run(reference, *given.values()),
        inputs,
        tolerance=TOLERANCES[dtype],
        gradient_tolerance=3e-2 if dtype == torch.bfloat16 else 0.0,
    )


@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_one_matrix_of_two(which: str) -> None:
    inputs, experts, _ = make_inputs("all experts", torch.float64, is_shared=True)
    gate_up, down = weights_of("all experts", torch.float64)
    part = LowRank(inputs[f"{which}_A"], inputs[f"{which}_B"], 1.0)
    lora = ExpertsLora(part if which == "gate_up" else None, part if which == "down" else None)
    routing = Routing(inputs["weights"], experts)
    one, other = (
        module.lora_experts_swiglu(inputs["x"], gate_up, down, lora, routing=routing) for module in (ops, reference)
    )
    torch.testing.assert_close(one, other)


def in_form(weight: Tensor, form: str) -> Tensor | Weight:
    """bf16, codes as on disk, or codes in panels."""
    if form == "bfloat16":
        return weight.to(torch.bfloat16)
    stack = weight if weight.dim() == 3 else weight[None]
    rounded = [round_nearest(each, find_scheme("int4-g32"), scale_dtype=torch.float32) for each in stack]
    packed = ops.empty_quantized(tuple(weight.shape), bits=4, group_size=32, scale_dtype=torch.float32)
    for expert, each in enumerate(rounded):
        ops.write_quantized(packed, each, expert=expert if weight.dim() == 3 else None)
    return packed


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_frozen_weights_of_any_form_give_the_gradient_of_their_numbers(form: str) -> None:
    """fp32 rows; the numbers are exact in fp32, so only sums round."""
    gate_up, down = (
        in_form(randn(4, *size, seed=1, dtype=torch.float32, scale=0.1), form) for size in [(64, 64), (64, 32)]
    )
    square = in_form(randn(64, 64, seed=5, dtype=torch.float32, scale=0.1), form)
    experts = choose(20, 4, 2, None)
    inputs = {
        "x": randn(20, 64, seed=0, dtype=torch.float32),
        "weights": randn(20, 2, seed=3, dtype=torch.float32).sigmoid(),
    }

    def run(module: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        out = module.experts_swiglu(x, gate_up, down, routing=Routing(weights, experts))
        return out, module.linear(x, square)

    assert_same_function(
        lambda **given: run(ops, *given.values()),
        lambda **given: run(reference, *given.values()),
        inputs,
        tolerance=TOLERANCES[torch.float32],
    )


def test_the_backward_pass_keeps_no_numbers_of_packed_weights() -> None:
    """What autograd holds is less than one dequantised matrix."""
    square = in_form(randn(256, 256, seed=5, dtype=torch.float32), "int4")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.nbytes), x)[1], lambda x: x):
        x = randn(2, 256, seed=0, dtype=torch.float32).requires_grad_()
        ops.linear(x, square).sum().backward()
    assert sum(kept) < 256 * 256


def test_factors_that_do_not_fit_are_refused() -> None:
    inputs, experts, _ = make_inputs("all experts", torch.float32, is_shared=False)
    gate_up, down = weights_of("all experts", torch.float32)
    routing = Routing(inputs["weights"], experts)
    part = LowRank(inputs["gate_up_A"][:, :, 1:], inputs["gate_up_B"], 1.0)
    with pytest.raises(ValueError, match="gate_up"):
        ops.lora_experts_swiglu(inputs["x"], gate_up, down, ExpertsLora(part, None), routing=routing)
