"""Weights that are no parameters: whatever looks at a module sees them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qnext import ops
from qnext.engine.storage.fingerprint import weights_digest
from qnext.model import CausalLM, HoldsWeights, held_bytes, named_tensors, named_weights
from qnext.ops import backends
from qnext.planning import list_parameters

from .models import PEER_CONFIGS, logits_of, make_in_form, make_model, random_tokens

NAME = "next, sizes of the native kernels"
needs_kernels = pytest.mark.skipif(backends.cpu_kernels() is None, reason="panels are what the native kernels read")


def quantized(model: CausalLM) -> CausalLM:
    """The same model with random codes in its head and in one stack of experts, in the form of the disk."""
    generator = torch.Generator().manual_seed(1)
    experts = model.model.layers[0].mlp.experts
    for module, key in ((model.lm_head, "weight"), (experts, "down_proj")):
        shape = getattr(module, key).shape
        codes = torch.randint(256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
        scales = torch.rand((*shape[:-1], shape[-1] // 16), generator=generator)
        module.set_weight(key, ops.QuantizedWeight(codes, scales, bits=4, group_size=16))
    return model


def test_names_are_those_of_the_parameters() -> None:
    plain, model = make_model(PEER_CONFIGS[NAME]), quantized(make_model(PEER_CONFIGS[NAME]))
    names = [name for name, _ in named_weights(model)]
    assert names == ["model.layers.0.mlp.experts.down_proj", "lm_head.weight"]
    infos = list_parameters(model.config)
    assert all(tuple(weight.shape) == infos[name].shape for name, weight in named_weights(model))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()} - set(names)
    assert [name for name, _ in named_weights(model.lm_head)] == ["weight"]
    codes = dict(named_tensors(model))["lm_head.weight.0"]
    assert codes is model.lm_head.own_weights()["weight"].tensors[0]


def test_a_parameter_comes_back() -> None:
    model = quantized(make_model(PEER_CONFIGS[NAME]))
    head = nn.Parameter(torch.zeros(model.config.vocab_size, model.config.hidden_size))
    model.lm_head.set_weight("weight", head)
    assert model.lm_head.weight is head
    assert "lm_head.weight" in dict(model.named_parameters())
    assert "lm_head.weight" not in dict(named_weights(model))


def test_a_weight_is_no_attribute() -> None:
    model = make_model(PEER_CONFIGS[NAME])
    weight = ops.QuantizedWeight(torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1), bits=8, group_size=8)
    for name in ("weight", "other"):
        with pytest.raises(TypeError, match=f"a Weight as {name} needs set_weight"):
            setattr(model.lm_head, name, weight)


@pytest.mark.parametrize("form", ["codes", pytest.param("panels", marks=needs_kernels)])
def test_state_dict_goes_round(form: str) -> None:
    """What was loaded computes what was saved, to the last bit."""

    def make() -> CausalLM:
        return quantized(make_model(PEER_CONFIGS[NAME])) if form == "codes" else make_in_form(NAME, "int4-g32")

    saved, loaded = make(), make()
    with torch.no_grad():
        for _, tensor in named_tensors(loaded):
            tensor.zero_()
    state = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    assert state.keys() == {name for name, _ in named_tensors(saved)}
    loaded.load_state_dict(state)
    tokens = random_tokens(saved.config, 9)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, tokens), logits_of(saved, tokens))


def test_state_dict_that_does_not_fit_is_refused() -> None:
    model = quantized(make_model(PEER_CONFIGS[NAME]))
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight\.1"):
        model.load_state_dict({key: value for key, value in state.items() if key != "lm_head.weight.1"})
    with pytest.raises(RuntimeError, match=r"lm_head\.weight\.0: torch.uint8 \[1, 2\] does not fit"):
        model.load_state_dict(state | {"lm_head.weight.0": torch.zeros(1, 2, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lm_head\.weight"):
        model.load_state_dict(state | {"lm_head.weight": torch.zeros(1)})


@needs_kernels
def test_weights_move_and_keep_their_type() -> None:
    model = make_in_form(NAME, "int8")
    before = dict(named_weights(model))
    model.to(torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(weight is before[name] for name, weight in named_weights(model))
    model.to("meta")
    assert all(tensor.is_meta for _, tensor in named_tensors(model))
    assert {name: weight.shape for name, weight in named_weights(model)} == {n: w.shape for n, w in before.items()}


@needs_kernels
def test_memory_counts_them_once() -> None:
    model = make_in_form(NAME, "int4-g32")
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    weights = sum(weight.nbytes for _, weight in named_weights(model))
    assert weights > 10_000 and held_bytes(model) == parameters + weights
    first = next(module for module in model.modules() if isinstance(module, HoldsWeights) and module.own_weights())
    key, weight = next(iter(first.own_weights().items()))
    other = nn.ModuleList([first, type(first)(4, 4, bias=False)])
    other[1].set_weight(key, weight)
    assert held_bytes(other) == held_bytes(first)


@needs_kernels
def test_fingerprints_see_every_code() -> None:
    model = make_in_form(NAME, "int4-g32")
    before = weights_digest(model)
    assert weights_digest(make_in_form(NAME, "int4-g32")) == before
    for _, weight in named_weights(model):
        for tensor in weight.tensors:
            kept = tensor.view(-1)[0].clone()
            tensor.view(-1)[0] += 1
            assert weights_digest(model) != before
            tensor.view(-1)[0] = kept
    assert weights_digest(model) == before
