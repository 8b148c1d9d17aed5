"""Native kernels with gradients against the formulas, on every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import Routing, SharedExpert, cpu, reference
from qnext.ops.backends import cpu_kernels

from .compare import LENGTHS, TOLERANCES, assert_same_function, randn

native = cpu_kernels()
pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built or not wanted")

# fp32 sums of up to 1,000 terms in a row: each adds half a unit in the last place at most, the RMS is far below.
TOLERANCE = 2e-6


@pytest.fixture(autouse=True, params=range(min(native.best_isa(), 2) + 1 if native else 0))
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    native.force_isa(request.param)
    yield
    native.force_isa(native.best_isa())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    ops.set_num_threads(request.param)
    yield
    ops.set_num_threads(before)


def linear_inputs(num_rows: int, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {
        "x": randn(num_rows, inputs, seed=0, dtype=torch.float32),
        "weight": randn(outputs, inputs, seed=1, dtype=torch.float32, scale=inputs**-0.5),
    }


@pytest.mark.parametrize("num_rows", LENGTHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 7), (33, 100), (400, 49), (1024, 32)])
def test_linear(num_rows: int, inputs: int, outputs: int) -> None:
    arguments = linear_inputs(num_rows, inputs, outputs)
    assert cpu.serves_linear(arguments["x"].requires_grad_(), arguments["weight"])
    assert_same_function(
        lambda x, weight: (ops.linear(x, weight),),
        lambda x, weight: (reference.linear(x, weight),),
        arguments,
        tolerance=TOLERANCE,
    )


def test_linear_of_columns_of_a_wider_matrix_and_of_a_broadcast_gradient() -> None:
    """Rows further apart than they are long, and a gradient without memory of its own."""
    wide = randn(130, 96, seed=0, dtype=torch.float32)
    weight = randn(20, 32, seed=1, dtype=torch.float32).requires_grad_()
    for x in (wide[:, 32:64], wide[:32].t()[:, :32], randn(32, 9, seed=2, dtype=torch.float32).t()):
        x = x.detach().requires_grad_()
        grads = torch.autograd.grad(ops.linear(x, weight).sum(), (x, weight))
        expected = torch.autograd.grad(reference.linear(x, weight).sum(), (x, weight))
        for actual, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=2e-6, atol=2e-5)


def test_bits_do_not_depend_on_threads_or_rows() -> None:
    arguments = linear_inputs(300, 400, 90)
    x, weight = (each.requires_grad_() for each in arguments.values())
    results = []
    for count in (1, 2):
        before = torch.get_num_threads()
        ops.set_num_threads(count)
        out = ops.linear(x, weight)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))))
        ops.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(ops.linear(x[37:38], weight), results[0][0][37:38])


EXPERTS = {  # tokens, hidden, width, experts, top_k, width of the shared one, chosen experts
    "one token": (1, 32, 16, 5, 2, 48, None),
    "no shared one": (65, 48, 32, 6, 3, 0, None),
    "shared": (130, 32, 48, 6, 2, 16, None),
    "idle experts": (63, 16, 16, 9, 2, 16, [1, 4, 8]),
    "an expert of many blocks": (300, 32, 16, 3, 2, 32, [0, 2]),
}


@pytest.mark.parametrize("case", list(EXPERTS))
@pytest.mark.parametrize("has_vector", [True, False])
def test_experts(case: str, has_vector: bool, threads: None) -> None:
    num_tokens, hidden, width, num_experts, top_k, of_shared, only = EXPERTS[case]
    pool = torch.tensor(only if only is not None else range(num_experts))
    generator = torch.Generator().manual_seed(9)
    experts = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:top_k]] for _ in range(num_tokens)])
    inputs = {
        "x": randn(num_tokens, hidden, seed=0, dtype=torch.float32),
        "gate_up": randn(num_experts, 2 * width, hidden, seed=1, dtype=torch.float32, scale=hidden**-0.5),
        "down": randn(num_experts, hidden, width, seed=2, dtype=torch.float32, scale=width**-0.5),
        "weights": randn(num_tokens, top_k, seed=3, dtype=torch.float32).sigmoid(),
    }
    if of_shared:
        inputs["gate"] = randn(of_shared, hidden, seed=14, dtype=torch.float32, scale=hidden**-0.5)
        inputs["up"] = randn(of_shared, hidden, seed=5, dtype=torch.float32, scale=hidden**-0.5)
        inputs["shared_down"] = randn(hidden, of_shared, seed=6, dtype=torch.float32, scale=of_shared**-0.5)
        if has_vector:
            inputs["vector"] = randn(1, hidden, seed=7, dtype=torch.float32, scale=hidden**-0.5)

    def call(run: ModuleType, tensors: dict[str, Tensor]) -> tuple[Tensor]:
        x, gate_up, down, weights = (tensors[name] for name in ("x", "gate_up", "down", "weights"))
        shared = None
        if of_shared:
            shared = SharedExpert(tensors["gate"], tensors["up"], tensors["shared_down"], tensors.get("vector"))
        return (run.experts_swiglu(x, gate_up, down, routing=Routing(weights, experts), shared=shared),)

    assert_same_function(
        lambda **tensors: call(cpu, tensors),
        lambda **tensors: call(reference, tensors),
        inputs,
        tolerance=TOLERANCE,
        gradient_tolerance=TOLERANCES[
            torch.float32
        ],  # one token's gradient of the vector is one sum, in part cancelled
    )


@pytest.mark.parametrize("num_rows", LENGTHS)
def test_head(num_rows: int, threads: None) -> None:
    labels = torch.randint(0, 103, (num_rows,), generator=torch.Generator().manual_seed(0))
    labels[num_rows // 2 :: 7] = -100
    assert_same_function(
        lambda x, weight: (cpu.cross_entropy_sum(x, weight, labels, chunk_rows=64)[None],),
        lambda x, weight: (reference.cross_entropy_sum(x, weight, labels, chunk_rows=64)[None],),
        {
            "x": randn(num_rows, 36, seed=0, dtype=torch.float32),
            "weight": randn(103, 36, seed=1, dtype=torch.float32, scale=2.0),
        },
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_route(num_tokens: int, norm_topk_prob: bool) -> None:
    options = {"top_k": 3, "norm_topk_prob": norm_topk_prob}
    scores = randn(num_tokens, 21, seed=0, dtype=torch.float32, scale=2.0)
    assert cpu.serves_route(scores.clone().requires_grad_(), **options)
    assert_same_function(
        lambda scores: (ops.route(scores, **options).weights_TA,),
        lambda scores: (reference.route(scores, **options).weights_TA,),
        {"scores": scores},
        tolerance=TOLERANCE,
    )


def test_what_is_frozen_gets_no_gradient() -> None:
    x = randn(5, 32, seed=0, dtype=torch.float32).requires_grad_()
    gate_up, down = randn(3, 32, 32, seed=1, dtype=torch.float32), randn(3, 32, 16, seed=2, dtype=torch.float32)
    routing = Routing(torch.ones(5, 1), torch.arange(5)[:, None] % 3)
    cpu.experts_swiglu(x, gate_up, down, routing=routing).sum().backward()
    cpu.cross_entropy_sum(x, gate_up[0], torch.arange(5), chunk_rows=4).backward()
    cpu.linear(x, gate_up[0]).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert gate_up.grad is None and down.grad is None


def test_ids_out_of_range_are_refused() -> None:
    x, weight = torch.ones(2, 32, requires_grad=True), torch.ones(3, 32)
    with pytest.raises(IndexError, match="label 3"):
        cpu.cross_entropy_sum(x, weight, torch.tensor([0, 3]), chunk_rows=4)
    routing = Routing(torch.ones(2, 1), torch.tensor([[0], [4]]))
    with pytest.raises(IndexError, match="expert 4"):
        cpu.experts_swiglu(x, torch.ones(3, 32, 32), torch.ones(3, 32, 16), routing=routing)
