"""Modules are called: whoever puts another in the place of one sees every call, and its change in every result.

A wrapper that multiplies what a module gives stands for a LoRA or a shard. The same is done to the weights of a second
model, so that what must come out is known.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qnext.model import Batch, CausalLM, Experts
from qnext.model.layers import MLP, Conv1d, Embedding, Linear, RMSNorm
from qnext.training.data import TrainBatch
from qnext.training.losses import RouterTap
from qnext.training.objective import NextToken, TrainStep

from .models import OneRequest, make_model, random_tokens
from .wrapping import CONFIG, WRAPPED, multiply_weights, names_of, put, wrap


def train(model: CausalLM) -> list[Tensor]:
    """The losses of one step, and the gradient of what comes first."""
    lengths, tokens = [7, 4], random_tokens(CONFIG, 13)
    labels_T, mtp_labels_T = tokens[1:12].clone(), tokens[2:13].clone()
    batch = TrainBatch(Batch.from_lengths(tokens[:11], lengths), tokens[1:12], labels_T, mtp_labels_T, 11, 11)
    tap = RouterTap(model)
    losses = NextToken(0.1, 0.01, 0.5)(model, batch, TrainStep([batch], 0.0, tap))
    tap.close()
    first = next(model.model.embed_tokens.parameters())
    return [losses.total, *losses.values.values(), *torch.autograd.grad(losses.total, [first], retain_graph=True)]


@torch.no_grad()
def prefill(model: CausalLM) -> list[Tensor]:
    request, tokens = OneRequest(model, 64), random_tokens(CONFIG, 70)
    return [model.logits(model(request.batch(part)).hidden_TD) for part in tokens[:64].split([40, 24])]


@torch.no_grad()
def decode(model: CausalLM) -> list[Tensor]:
    request, tokens = OneRequest(model, 32), random_tokens(CONFIG, 12)
    model(request.batch(tokens[:8]))
    return [model.logits(model(request.batch(token)).hidden_TD) for token in tokens[8:].split(1)]


@torch.no_grad()
def draft(model: CausalLM) -> list[Tensor]:
    """Tokens of the MTP layer one after another, each from its own rows."""
    request, tokens = OneRequest(model, 32), random_tokens(CONFIG, 9)
    batch = request.batch(tokens[:8])
    rows_TD = model.draft_hidden(tokens[1:], model(batch), batch)
    again_TD = model.draft_step(tokens[1:], rows_TD, batch)
    return [model.logits(rows_TD), model.logits(again_TD)]


COMPUTATIONS = {"training": train, "prefill": prefill, "decode": decode, "drafting": draft}


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_every_module_is_called_and_its_change_is_in_effect(backend: str, computation: str) -> None:
    model, compute = make_model(CONFIG), COMPUTATIONS[computation]
    plain = compute(model)
    has_mtp = computation in ("training", "drafting")
    for name in names_of(*WRAPPED):
        if name.startswith("mtp.") and not has_mtp:
            continue
        wrapper = wrap(model, name)
        found = compute(model)
        put(model, name, wrapper.inner)
        before = deepcopy(wrapper.inner.state_dict())
        multiply_weights(model, name)
        wanted = compute(model)
        wrapper.inner.load_state_dict(before)
        assert wrapper.num_calls > 0, name
        for one, other in zip(found[:5], wanted[:5], strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4), name
        is_same = [torch.allclose(one, other, rtol=1e-2, atol=1e-3) for one, other in zip(found, plain, strict=True)]
        assert not all(is_same), name


def test_steps_are_what_the_fused_op_computes(backend: str) -> None:
    """Norms and convolutions of a class of their own are called, and nothing else changes."""

    class OtherNorm(RMSNorm):
        pass

    class OtherConv(Conv1d):
        pass

    model = make_model(CONFIG)
    other = deepcopy(model)
    for module in other.modules():
        if type(module) is RMSNorm:
            module.__class__ = OtherNorm
        if type(module) is Conv1d:
            module.__class__ = OtherConv
    for compute in COMPUTATIONS.values():
        for one, same in zip(compute(other), compute(model), strict=True):
            if backend == "torch":
                assert torch.equal(one, same)
            else:
                assert torch.allclose(one, same, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", names_of(*WRAPPED, Conv1d))
def test_a_hook_is_called(name: str) -> None:
    model = make_model(CONFIG)
    seen: list[Any] = []
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    prefill(model)
    draft(model)
    assert seen


@pytest.mark.parametrize("kind", [Linear, RMSNorm, Experts, MLP, Embedding])
def test_gradients_reach_what_is_wrapped(kind: type[nn.Module]) -> None:
    model = make_model(CONFIG)
    wrappers = [wrap(model, name) for name in names_of(kind) if not (kind is Linear and "shared_expert." in name)]
    sum(train(model)[:1]).backward()
    for wrapper in wrappers:
        assert all(parameter.grad is not None for parameter in wrapper.parameters())
