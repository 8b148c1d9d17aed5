"""Norms and routing by GPU kernels are the reference's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import Norm, backends, dequantize, reference
from qnext.ops import triton as gpu
from qnext.ops.triton.trust import is_trusted, numbers

from ..compare import assert_close, randn
from .device import DEVICE, TOLERANCE, exact
from .test_matrices import make_weight


def test_kernels_serve_here() -> None:
    assert backends.backend_of(DEVICE).name == "triton"
    assert ops.arithmetic_of(DEVICE).startswith("triton ")


@pytest.mark.parametrize("self_test", gpu.SELF_TESTS, ids=lambda test: test.__name__)
def test_every_kernel_passes_its_self_test(self_test: gpu.SelfTest) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the GPU kernel")
        assert is_trusted(self_test, DEVICE)
    assert gpu.self_test_error(self_test, DEVICE) < TOLERANCE


def try_wrong(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x = numbers(4, seed=0, device=device)
    yield x, x
    yield x * 1.001, x


def try_nan(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x = numbers(4, seed=0, device=device)
    yield x * float("nan"), x
    yield x, x


def try_broken(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    yield from ()
    raise RuntimeError("out of registers\nand a long trace")


@pytest.mark.parametrize(
    "self_test, reason",
    [(try_wrong, "is off by 1.0e-03"), (try_nan, "is off by nan"), (try_broken, r"RuntimeError: out of registers\)")],
)
def test_a_kernel_that_fails_its_self_test_is_named_once_and_not_used(self_test: gpu.SelfTest, reason: str) -> None:
    name = self_test.__name__.removeprefix("try_")
    with pytest.warns(RuntimeWarning, match=rf"the GPU kernel {name} .*{reason}.*PyTorch computes instead") as seen:
        assert not is_trusted(self_test, DEVICE)
        assert not is_trusted(self_test, DEVICE)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (3, 64), (2, 3, 100)], ids=str)
def test_rms_norm(shape: tuple[int, ...], zero_centered: bool, dtype: torch.dtype) -> None:
    x, weight_D = randn(*shape, seed=0, dtype=dtype).to(DEVICE), randn(shape[-1], seed=1, dtype=dtype).to(DEVICE)
    assert gpu.serves_rms_norm(x, weight_D, eps=1e-6, zero_centered=zero_centered)
    y = ops.rms_norm(x, weight_D, eps=1e-6, zero_centered=zero_centered)
    assert y.dtype == dtype and y.shape == x.shape
    wanted = reference.rms_norm(exact(x), exact(weight_D), eps=1e-6, zero_centered=zero_centered)
    assert_close(y.cpu(), wanted, tolerance=TOLERANCE if dtype == torch.float32 else 1e-2)


def test_rms_norm_of_rows_that_lie_apart() -> None:
    """Numbers between the rows, and rows of zeros."""
    x = torch.full((4, 3, 40), float("nan"), device=DEVICE)[:, 1, :24]
    x.copy_(randn(4, 24, seed=0))
    x[2] = 0.0
    weight_D = randn(48, seed=1, dtype=torch.float32).to(DEVICE)[::2]
    y = ops.rms_norm(x, weight_D, eps=1e-6, zero_centered=True)
    wanted = reference.rms_norm(exact(x), exact(weight_D), eps=1e-6, zero_centered=True)
    assert_close(y.cpu(), wanted, tolerance=TOLERANCE)
    assert (y[2] == 0).all()


def test_fp64_and_the_gradient_of_a_choice_are_not_served() -> None:
    x, weight_D = torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE, requires_grad=True)
    for weight in (weight_D, weight_D.detach()):
        assert not gpu.serves_rms_norm(x.double(), weight, eps=1e-6, zero_centered=True)
    assert not gpu.serves_route(x.requires_grad_(), top_k=2, norm_topk_prob=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts, top_k", [(5, 5), (33, 4), (64, 1)])
def test_route(num_experts: int, top_k: int, norm_topk_prob: bool, dtype: torch.dtype) -> None:
    logits_TE = randn(3, num_experts, seed=2, dtype=dtype, scale=3.0).to(DEVICE)
    load_E = torch.full((num_experts,), 7, dtype=torch.int64, device=DEVICE)
    assert gpu.serves_route(logits_TE, top_k=top_k, norm_topk_prob=norm_topk_prob, load_E=load_E)
    routing = ops.route(logits_TE, top_k=top_k, norm_topk_prob=norm_topk_prob, load_E=load_E)
    wanted_load_E = torch.full((num_experts,), 7, dtype=torch.int64)
    wanted = reference.route(exact(logits_TE), top_k=top_k, norm_topk_prob=norm_topk_prob, load_E=wanted_load_E)
    assert torch.equal(routing.experts_TA.cpu(), wanted.experts_TA)
    assert torch.equal(load_E.cpu(), wanted_load_E)
    assert_close(routing.weights_TA.cpu(), wanted.weights_TA, tolerance=TOLERANCE)


@pytest.mark.parametrize("num_tokens, kind", [(3, "fp32"), (19, "int4")])
def test_a_norm_and_the_choice_behind_it(num_tokens: int, kind: str) -> None:
    """More programs than one, and more tokens than one block of them; the second call counts on in the load."""
    weight = make_weight(kind, 37, 40, seed=3)
    x_TD = randn(num_tokens, 40, seed=4, dtype=torch.float32).to(DEVICE)
    norm, load_E = Norm(torch.zeros(40, device=DEVICE), 1e-6, True), torch.zeros(37, dtype=torch.int64, device=DEVICE)
    how: dict[str, Any] = {"top_k": 4, "norm_topk_prob": True}
    assert gpu.serves_normed_route(x_TD, norm, weight, **how, load_E=load_E)
    for times in (1, 2):
        ours = ops.normed_route(x_TD, norm, weight, **how, load_E=load_E)
        exact_norm, wide = norm._replace(weight_D=exact(norm.weight_D)), exact(dequantize(weight, torch.float32))
        wanted = reference.normed_route(exact(x_TD), exact_norm, wide, **how)
        assert torch.equal(ours.routing.experts_TA.cpu(), wanted.routing.experts_TA)
        assert torch.equal(load_E.cpu(), times * wanted.routing.experts_TA.flatten().bincount(minlength=37))
        pairs = (
            (ours.rows_TD, wanted.rows_TD),
            (ours.logits_TE, wanted.logits_TE),
            (ours.routing[0], wanted.routing[0]),
        )
        for actual, expected in pairs:
            assert_close(actual.cpu(), expected, tolerance=TOLERANCE)


def test_of_equal_scores_the_lowest_number_wins_and_nan_names_an_expert() -> None:
    logits_TE = torch.zeros(2, 21, device=DEVICE)
    logits_TE[1, 3] = float("nan")
    experts_TA = ops.route(logits_TE, top_k=4, norm_topk_prob=True).experts_TA
    assert experts_TA[0].tolist() == [0, 1, 2, 3]
    assert ((experts_TA[1] >= 0) & (experts_TA[1] < 21)).all()


def test_a_replayed_choice_is_torchs_work() -> None:
    logits_TE, chosen_TA = torch.zeros(1, 4, device=DEVICE), torch.tensor([[2, 1]], device=DEVICE)
    assert not gpu.serves_route(logits_TE, top_k=2, norm_topk_prob=True, chosen_TA=chosen_TA)
    assert ops.route(logits_TE, top_k=2, norm_topk_prob=True, chosen_TA=chosen_TA).experts_TA.tolist() == [[2, 1]]
