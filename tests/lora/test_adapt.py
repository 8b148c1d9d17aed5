"""An adapted model is the model whose weights are W + scale B A, forward and gradient, whatever form W has."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from qnext.errors import UsageError
from qnext.lora import Adapter, LoraConfig, adapter_of, add_lora, attach, lora_parameters, merge, train_only
from qnext.model import CausalLM
from qnext.model.init import initialize
from qnext.ops import LowRank
from qnext.planning import Kind, list_parameters
from tests.model.models import make_in_form, make_model
from tests.ops.compare import randn, relative_rms

from .models import CONFIG, LORAS, NAME, SHAPE, outputs_of, weights_of, with_random_lora


def materialised(model: CausalLM, weights: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """All weights with their changes, differentiable in the factors."""
    changed = dict(weights)
    for name, part in adapter.parts.items():
        delta = part.scale * (part.B @ part.A)
        places_E = adapter.places.get(name.rpartition(".")[0])
        if places_E is not None:
            padded = torch.cat([delta, torch.zeros_like(delta[:1])])
            delta = padded[places_E]
        changed[name] = changed[name] + delta
    if model.config.tie_word_embeddings:
        changed["lm_head.weight"] = changed["model.embed_tokens.weight"]
    return changed


def expected(model: CausalLM, cotangent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs in fp64, and the gradients of all factors by the names of parameter and factor."""
    adapter = adapter_of(model)
    factors = {
        name: (part.A.double().requires_grad_(), part.B.double().requires_grad_())
        for name, part in adapter.parts.items()
    }
    parts = {name: LowRank(*factors[name], part.scale) for name, part in adapter.parts.items()}
    formula = CausalLM(model.config).double()
    initialize(formula, seed=0)
    weights = materialised(model, weights_of(model), Adapter(parts, adapter.places))

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = formula

        def forward(self) -> Tensor:
            return outputs_of(self.model)

    out = functional_call(Outputs(), {f"model.{name}": weight for name, weight in weights.items()}, ())
    if cotangent is None:
        return out, {}
    out.backward(cotangent)
    gradients = {
        f"{name}/{letter}": factor.grad
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    return out, {name: grad for name, grad in gradients.items() if grad is not None}


def gradients_of(model: CausalLM) -> dict[str, Tensor]:
    """Of the factors, by the same names."""
    found = {}
    for name in adapter_of(model).parts:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        stem = "lora" if key == "weight" else f"{key.removesuffix('_proj')}_lora"
        for letter in "AB":
            grad = module.get_parameter(f"{stem}_{letter}").grad
            assert grad is not None, f"{name}: no gradient reached {letter}"
            found[f"{name}/{letter}"] = grad
    return found


# Every shape of a change with plain weights; packed weights with both forms of experts.
CASES = [(lora, "float32") for lora in LORAS]
CASES += [
    (lora, form) for lora in ("all, shared outer", "some experts, own factors") for form in ("bfloat16", "int4-g32")
]
TOLERANCE = 2e-5


@pytest.mark.parametrize(("lora", "form"), CASES)
def test_outputs_and_gradients_are_those_of_changed_weights(lora: str, form: str) -> None:
    """Rows are fp32 for every form, and weights of every form are exact in fp32; so only sums round.

    The rows of the embedding ask for a gradient: otherwise kernels compute the first layer and round its inputs.
    """
    model = with_random_lora(make_in_form(NAME, form, **SHAPE), LORAS[lora])
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, rows_TD: rows_TD.requires_grad_())
    outputs = outputs_of(model)
    cotangent = randn(*outputs.shape, seed=6)  # no gradient is one sum that comes out near zero
    outputs.backward(cotangent.to(outputs.dtype))
    wanted, gradients = expected(model, cotangent)
    assert relative_rms(outputs.detach(), wanted.detach()) <= TOLERANCE
    found = gradients_of(model)
    assert found.keys() == gradients.keys()
    for name, grad in found.items():
        assert relative_rms(grad, gradients[name]) <= 10 * TOLERANCE, name
    factors = lora_parameters(model)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in factors)


@pytest.mark.parametrize("lora", list(LORAS))
def test_merged_is_adapted(lora: str) -> None:
    model = with_random_lora(make_model(CONFIG), LORAS[lora])
    with torch.no_grad():
        before = outputs_of(model)
        merge(model)
        assert type(model) is CausalLM
        assert not lora_parameters(model)
        assert relative_rms(outputs_of(model), before) <= 2e-5
    assert {name for name, _ in model.named_parameters()} == set(list_parameters(CONFIG))


@pytest.mark.parametrize("lora", list(LORAS))
def test_a_new_adapter_changes_nothing(lora: str) -> None:
    model = make_model(CONFIG)
    tokens_before = outputs_of(model)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_lora(model, LORAS[lora])
    for name, part in adapter_of(model).parts.items():
        assert part.A.any() != part.B.any(), name
    assert relative_rms(outputs_of(model), tokens_before) <= 5e-6
    merge(model)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_factors_depend_on_seed_and_name_alone() -> None:
    first, second, other = (make_model(CONFIG) for _ in range(3))
    add_lora(first, LoraConfig("all"), seed=3)
    add_lora(second, LoraConfig("attention"), seed=3)
    add_lora(other, LoraConfig("attention"), seed=4)
    ours, same, different = (adapter_of(model).parts for model in (first, second, other))
    assert same.keys() < ours.keys()
    assert all(torch.equal(part.A, ours[name].A) for name, part in same.items())
    assert not any(torch.equal(part.A, different[name].A) for name, part in same.items())


def test_attach_shares_the_factors() -> None:
    model, other = with_random_lora(make_model(CONFIG), LORAS["all, own factors"]), make_model(CONFIG)
    attach(other, adapter_of(model))
    assert torch.equal(outputs_of(other), outputs_of(model))


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (LoraConfig("experts", experts={0: (8,)}), "expert 8 of 8"),
        (LoraConfig("experts", experts={9: (1,)}), "layer 9"),
    ],
)
def test_what_does_not_exist_is_refused(config: LoraConfig, culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        add_lora(make_model(CONFIG), config)


def test_an_adapter_of_another_model_is_refused() -> None:
    model = make_model(CONFIG)
    part = LowRank(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises(UsageError, match=r"self_attn\.q_proj"):
            attach(model, Adapter({name: part}))
    add_lora(model, LoraConfig("attention"))
    with pytest.raises(UsageError, match="already"):
        add_lora(model, LoraConfig("attention"))


def test_expert_only_tuning_freezes_the_rest() -> None:
    model = make_model(CONFIG)
    train_only(model, {Kind.EXPERTS_DOWN}, mtp=False)
    outputs_of(model).sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    infos = list_parameters(CONFIG)
    assert got == {name for name, info in infos.items() if info.kind is Kind.EXPERTS_DOWN and info.part != "mtp"}
    plain = deepcopy(model).requires_grad_(True)
    outputs_of(plain).sum().backward()
    for name in got:
        ours, theirs = model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert ours is not None
        assert theirs is not None
        assert relative_rms(ours, theirs) <= 2e-5
