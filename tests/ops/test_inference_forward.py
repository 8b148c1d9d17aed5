"""Calls with gradients in the mode of inference: its bits, and the gradients of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.model import Batch, DecoderLayer
from qnext.ops import reference
from tests.engine.models import KINDS, VOCAB_SIZE, needs_native, tiny_model

from .compare import assert_close, randn


def a_batch() -> Batch:
    token_ids_T = torch.randint(VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1))
    return Batch.from_lengths(token_ids_T, [70, 1, 19])


def loss_and_gradients(kind: str, *, as_inference: bool, is_recomputed: bool = False) -> tuple[Tensor, list[Tensor]]:
    model = tiny_model(kind)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            module.is_recomputed = is_recomputed
    batch = a_batch()
    parameters = [each for each in model.parameters() if each.requires_grad]
    if as_inference:
        with ops.inference_forward():
            logits_TY = model.logits(model(batch).hidden_TD)
    else:
        logits_TY = model.logits(model(batch).hidden_TD)
    return logits_TY.detach(), list(torch.autograd.grad(logits_TY.square().mean(), parameters))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_bits_of_inference_and_the_gradient_of_training(kind: str) -> None:
    model = tiny_model(kind)
    logits_TY, gradients = loss_and_gradients(kind, as_inference=True)
    plain_TY, expected = loss_and_gradients(kind, as_inference=False)
    assert not torch.equal(logits_TY, plain_TY), "other kernels have other bits"
    batch = a_batch()
    with torch.inference_mode():
        assert torch.equal(logits_TY, model.logits(model(batch).hidden_TD))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, tolerance=1e-4)


@needs_native
def test_a_layer_that_is_computed_again_is_in_the_same_mode() -> None:
    logits_TY, gradients = loss_and_gradients(KINDS[0], as_inference=True)
    again_TY, others = loss_and_gradients(KINDS[0], as_inference=True, is_recomputed=True)
    assert torch.equal(again_TY, logits_TY)
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


def test_the_mode_ends_with_its_block() -> None:
    x = randn(3, 32, seed=0).requires_grad_()
    with ops.inference_forward():
        inside = ops.add(x, x)
    assert "InferenceForward" in type(inside.grad_fn).__name__
    assert "InferenceForward" not in type(ops.add(x, x).grad_fn).__name__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_replayed_choice_has_the_weights_of_the_scores(dtype: torch.dtype, norm_topk_prob: bool) -> None:
    """Its own choice has the same bits as without replay; any other those of the formula; the load is that choice."""
    logits = randn(40, 13, seed=0, dtype=dtype, scale=2.0)
    own = ops.route(logits, top_k=3, norm_topk_prob=norm_topk_prob)
    again = ops.route(logits, top_k=3, norm_topk_prob=norm_topk_prob, chosen_TA=own.experts_TA)
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))
    other_TA = own.experts_TA.roll(1, dims=0)
    load_E = torch.zeros(13, dtype=torch.long)
    found = ops.route(logits, top_k=3, norm_topk_prob=norm_topk_prob, load_E=load_E, chosen_TA=other_TA)
    wanted = reference.route(logits.double(), top_k=3, norm_topk_prob=norm_topk_prob, chosen_TA=other_TA)
    assert_close(found.weights_TA.double(), wanted.weights_TA, tolerance=1e-6)
    assert torch.equal(found.experts_TA, other_TA) and torch.equal(load_E, other_TA.flatten().bincount(minlength=13))


def test_a_replayed_choice_has_a_gradient_of_all_scores() -> None:
    """The weights come from the full softmax: without renormalising, scores of experts that were not chosen count."""
    logits, chosen_TA = randn(5, 7, seed=0).requires_grad_(), torch.tensor([[6, 0], [1, 2], [3, 6], [5, 4], [0, 1]])
    for norm in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, n=norm: ops.route(x, top_k=2, norm_topk_prob=n, chosen_TA=chosen_TA).weights_TA, (logits,)
        )
    with pytest.raises(ValueError, match="a choice of"):
        ops.route(logits, top_k=3, norm_topk_prob=True, chosen_TA=chosen_TA)


def test_log_probabilities_are_those_of_the_formula() -> None:
    logits, ids = randn(30, 97, seed=3, scale=5.0), torch.arange(30)
    expected = logits.double().log_softmax(-1)[torch.arange(30), ids]
    torch.testing.assert_close(ops.token_log_probs(logits, ids), expected, rtol=1e-6, atol=1e-6)
    wide = randn(4, 9, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.token_log_probs(x, ids[:4]), (wide,))
