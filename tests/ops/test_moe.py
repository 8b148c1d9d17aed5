"""Routing and grouped experts against the formula, a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import Routing, reference

from .compare import TOLERANCES, assert_close, assert_same_function, randn


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_route(norm_topk_prob: bool, dtype: torch.dtype) -> None:
    """Softmax over all experts, then the best; in fp32 also for bf16 scores."""
    logits = randn(70, 13, seed=0, dtype=dtype, scale=2.0)
    routing = ops.route(logits, top_k=4, norm_topk_prob=norm_topk_prob)
    assert routing.weights_TA.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    expected, _ = exact.sort(-1, descending=True)
    expected = expected[:, :4]
    wanted = expected / expected.sum(-1, keepdim=True) if norm_topk_prob else expected
    assert_close(routing.weights_TA.double(), wanted, tolerance=1e-6)
    chosen = exact.gather(1, routing.experts_TA)
    assert_close(chosen, expected, tolerance=1e-12)
    assert all(len(set(row)) == 4 for row in routing.experts_TA.tolist())


def test_route_gradient() -> None:
    logits = randn(5, 7, seed=0).requires_grad_()
    for norm in (True, False):
        assert torch.autograd.gradcheck(lambda x, n=norm: ops.route(x, top_k=3, norm_topk_prob=n).weights_TA, (logits,))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_route_adds_to_the_load(dtype: torch.dtype, num_threads: int) -> None:
    """The native kernel takes fp32, the reference the others; the choice is that without a count."""
    before = torch.get_num_threads()
    ops.set_num_threads(num_threads)
    try:
        load_E = torch.arange(13)
        for num_tokens in (1, 0, 15, 1000):
            logits = randn(num_tokens, 13, seed=num_tokens, dtype=dtype)
            expected = load_E.clone()
            routing = ops.route(logits, top_k=4, norm_topk_prob=True, load_E=load_E)
            for expert in routing.experts_TA.flatten().tolist():
                expected[expert] += 1
            assert torch.equal(load_E, expected)
            plain = ops.route(logits, top_k=4, norm_topk_prob=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, routing, strict=True))
    finally:
        ops.set_num_threads(before)


def test_huge_scores_stay_finite() -> None:
    weights = ops.route(torch.tensor([[1e4, -1e4, 0.0, 1e4]]), top_k=2, norm_topk_prob=True).weights_TA
    assert_close(weights, torch.tensor([[0.5, 0.5]]), tolerance=1e-6)


def choose(num_tokens: int, num_experts: int, top_k: int, only: list[int] | None) -> Tensor:
    pool = torch.tensor(only if only is not None else range(num_experts))
    generator = torch.Generator().manual_seed(9)
    return torch.stack([pool[torch.randperm(len(pool), generator=generator)[:top_k]] for _ in range(num_tokens)])


CASES = {
    "aligned widths": (130, 16, 8, 6, 2, None),
    "odd widths": (65, 11, 7, 5, 3, None),
    "one odd width": (40, 16, 5, 4, 2, None),
    "more experts than assignments": (2, 16, 8, 40, 3, None),
    "one token": (1, 16, 8, 6, 2, None),
    "one token, odd": (1, 9, 3, 6, 2, None),
    "experts without a token": (64, 16, 8, 9, 2, [1, 4, 8]),
    "experts without a token, odd": (64, 9, 3, 9, 2, [1, 4, 8]),
    "every token at the same experts": (63, 16, 8, 8, 2, [0, 7]),
    "one expert": (10, 16, 8, 1, 1, None),
    "top one": (20, 12, 4, 5, 1, None),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", list(CASES))
def test_experts(case: str, dtype: torch.dtype) -> None:
    num_tokens, hidden, width, num_experts, top_k, only = CASES[case]
    experts = choose(num_tokens, num_experts, top_k, only)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": randn(num_tokens, hidden, seed=0, dtype=dtype),
        "gate_up": randn(num_experts, 2 * width, hidden, seed=1, dtype=dtype, scale=hidden**-0.5),
        "down": randn(num_experts, hidden, width, seed=2, dtype=dtype, scale=width**-0.5),
        "weights": randn(num_tokens, top_k, seed=3, dtype=wide).sigmoid(),
    }
    assert_same_function(
        lambda x, gate_up, down, weights: (ops.experts_swiglu(x, gate_up, down, routing=Routing(weights, experts)),),
        lambda x, gate_up, down, weights: (
            reference.experts_swiglu(x, gate_up, down, routing=Routing(weights, experts)),
        ),
        inputs,
        tolerance=TOLERANCES[dtype],
        gradient_tolerance=3e-2 if dtype == torch.bfloat16 else 0.0,
    )


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)])
def test_gradients_by_finite_differences(sizes: tuple[int, int]) -> None:
    hidden, width = sizes
    experts = choose(4, 5, 2, [0, 2, 3])
    inputs = (
        randn(4, hidden, seed=0),
        randn(5, 2 * width, hidden, seed=1),
        randn(5, hidden, width, seed=2),
        randn(4, 2, seed=3).sigmoid(),
    )
    assert torch.autograd.gradcheck(
        lambda x, g, d, w: ops.experts_swiglu(x, g, d, routing=Routing(w, experts)),
        tuple(x.requires_grad_() for x in inputs),
    )


@pytest.mark.parametrize("width", [8, 7])
def test_an_expert_without_a_token_has_a_gradient_of_zero(width: int) -> None:
    """Zero and not left over from the allocator: an optimizer reads every row."""
    gate_up, down = randn(6, 2 * width, 16, seed=1, dtype=torch.float32), randn(6, 16, width, seed=2).float()
    gate_up.requires_grad_()
    down.requires_grad_()
    experts = choose(20, 6, 2, [1, 3, 4])
    routing = Routing(torch.full((20, 2), 0.5), experts)
    ops.experts_swiglu(randn(20, 16, seed=0).float(), gate_up, down, routing=routing).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert grad is not None
        used = grad.abs().flatten(1).amax(1) > 0
        assert used.tolist() == [False, True, False, True, True, False]


def test_narrow_weights_follow_the_activations() -> None:
    """Weights kept in fp32 are cast to the dtype of the activations; their gradients come back in fp32."""
    gate_up, down = randn(4, 16, 16, seed=1, dtype=torch.float32), randn(4, 16, 8, seed=2, dtype=torch.float32)
    x = randn(10, 16, seed=0, dtype=torch.bfloat16)
    routing = Routing(torch.full((10, 2), 0.5), choose(10, 4, 2, None))
    mixed = ops.experts_swiglu(x, gate_up.requires_grad_(), down.requires_grad_(), routing=routing)
    same = ops.experts_swiglu(x, gate_up.bfloat16(), down.bfloat16(), routing=routing)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, same)
    mixed.sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad.dtype == torch.float32


def test_swiglu() -> None:
    x = randn(3, 10, seed=0)
    gate, up = x[:, :5], x[:, 5:]
    assert_close(ops.swiglu(gate, up), gate * torch.sigmoid(gate) * up, tolerance=1e-14)


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combined_rows_are_the_experts_own_bits(dtype: torch.dtype, with_shared: bool) -> None:
    """What experts make of tokens one by one, with the weight one, and then added up, is what they do at once."""
    x_TD = randn(9, 64, seed=0).float()
    gate_up, down = randn(5, 64, 64, seed=1, scale=0.2).to(dtype), randn(5, 64, 32, seed=2, scale=0.2).to(dtype)
    routing = ops.route(randn(9, 5, seed=3).float(), top_k=3, norm_topk_prob=True)
    mlp = [randn(32, 64, seed=4), randn(32, 64, seed=5), randn(64, 32, seed=6)]
    gate, up, down_shared = (0.2 * each.to(dtype) for each in mlp)
    gate_1D = randn(1, 64, seed=7).float()
    shared = ops.SharedExpert(gate, up, down_shared, gate_1D) if with_shared else None
    with torch.inference_mode():
        at_once = ops.experts_swiglu(x_TD, gate_up, down, routing=routing, shared=shared)
        one_by_one = Routing(torch.ones(27, 1), routing.experts_TA.view(27, 1))
        rows = ops.experts_swiglu(x_TD.repeat_interleave(3, 0), gate_up, down, routing=one_by_one)
        order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
        made = None
        if with_shared:
            inner = ops.swiglu(ops.linear(x_TD, gate), ops.linear(x_TD, up))
            made = ops.MadeByShared(x_TD, ops.linear(inner, down_shared), gate_1D)
        found = ops.combine_experts(rows[order], routing.weights_TA, order.argsort().view(9, 3), made)
    if ops.backend_of(torch.device("cpu")).is_cut_invariant:
        assert torch.equal(found, at_once)
    assert_close(found, at_once, tolerance=1e-5)
