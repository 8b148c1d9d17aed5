"""The loss without an expert, against the whole model read again with another router."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qnext.config import preset
from qnext.diagnostics.routing.ablation import AblationPlan, Removal, ablate, without
from qnext.diagnostics.routing.record import read_routing
from qnext.errors import UsageError
from qnext.eval import EvalDocument, evaluate_perplexity
from qnext.model import CausalLM, RouterOutput, SparseMoE
from qnext.model.init import initialize
from qnext.ops import Routing, route

CONFIG = replace(
    preset("nano-5m").with_layers(4),
    vocab_size=64,
    hidden_size=32,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    num_nextn_predict_layers=0,
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    made = CausalLM(CONFIG)
    initialize(made, seed=3)
    return made


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    found: list[int] = torch.randint(0, 64, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    return found


def bits_per_byte(model: CausalLM, token_ids: list[int]) -> float:
    return evaluate_perplexity(model, [EvalDocument(token_ids, 300)], sequence_length=128).bits_per_byte


@pytest.mark.parametrize("removal", ["reroute", "zero"])
def test_effects_are_those_of_the_whole_model(model: CausalLM, token_ids: list[int], removal: Removal) -> None:
    """Pieces of a longer text, layers of both kinds, an expert of every layer; the model is as before afterwards."""
    record = read_routing(model, token_ids)
    plan = AblationPlan(("top:1", "2:5"), removal)
    found = ablate(model, token_ids, record, plan, num_bytes=300)
    assert found.bits_per_byte == pytest.approx(bits_per_byte(model, token_ids), abs=1e-9)
    busiest = record.counts().argmax(axis=1).tolist()
    named = [(int(each.label), each.expert) for each in found.effects]
    assert named == [(0, busiest[0]), (1, busiest[1]), (2, busiest[2]), (2, 5), (3, busiest[3])]
    for each in found.effects:
        layer = model.model.layers[int(each.label)].mlp
        assert isinstance(layer, SparseMoE)

        def remove(module: Any, inputs: Any, output: RouterOutput, expert: int = each.expert) -> RouterOutput:
            if removal == "zero":
                weights_TA, experts_TA = output.routing
                return output._replace(routing=Routing(weights_TA * (experts_TA != expert), experts_TA))
            logits_TE = output.logits_TE.clone()
            logits_TE[:, expert] = -1e30
            return output._replace(routing=route(logits_TE, top_k=2, norm_topk_prob=CONFIG.norm_topk_prob))

        handle = layer.gate.register_forward_hook(remove)
        changed = bits_per_byte(model, token_ids)
        handle.remove()
        assert each.effect.value == pytest.approx(changed - found.bits_per_byte, abs=1e-6)
        assert each.effect.low < each.effect.value < each.effect.high
        assert each.is_real == (each.effect.low > 0 or each.effect.high < 0)
        place = int(each.label)
        assert each.mass_share == pytest.approx(record.mass_LE[place, each.expert] / record.mass_LE[place].sum())
    assert bits_per_byte(model, token_ids) == pytest.approx(found.bits_per_byte, abs=1e-9)


def test_tokens_that_did_not_choose_it_keep_their_bits(model: CausalLM) -> None:
    layer = model.model.layers[0].mlp
    assert isinstance(layer, SparseMoE)
    with torch.no_grad():
        output = layer.gate(torch.randn(200, 32, generator=torch.Generator().manual_seed(0)))
    expert = int(output.routing.experts_TA[0, 0])
    has_T = (output.routing.experts_TA == expert).any(1)
    assert 0 < has_T.sum() < 200
    for removal in ("reroute", "zero"):
        after = without(output, expert, router=layer.gate, removal=removal).routing
        assert torch.equal(after.weights_TA[~has_T], output.routing.weights_TA[~has_T])
        assert torch.equal(after.experts_TA[~has_T], output.routing.experts_TA[~has_T])
        if removal == "reroute":
            assert not (after.experts_TA == expert).any()
            assert after.weights_TA.sum(1) == pytest.approx(torch.ones(200))
        else:
            assert (after.weights_TA.sum(1) < 1 - 1e-3).equal(has_T)


def test_an_expert_that_nobody_uses(model: CausalLM, token_ids: list[int]) -> None:
    """Nothing is computed for it, and its effect is exactly zero."""
    other = CausalLM(CONFIG)
    other.load_state_dict(model.state_dict())
    layer = other.model.layers[1].mlp
    assert isinstance(layer, SparseMoE)
    layer.gate.register_forward_hook(
        lambda module, inputs, output: without(output, 4, router=module, removal="reroute")
    )
    record = read_routing(other, token_ids)
    (effect,) = ablate(other, token_ids, record, AblationPlan(("1:4",)), num_bytes=300).effects
    assert (effect.token_share, effect.mass_share, effect.effect.value, effect.own_effect) == (0, 0, 0, None)


def test_ranks_of_mass_and_effect(model: CausalLM, token_ids: list[int]) -> None:
    record = read_routing(model, token_ids)
    found = ablate(model, token_ids, record, AblationPlan(("spread:8",)), num_bytes=300)
    assert len(found.effects) == 4 * 8  # all experts, the busiest of a layer first
    for label, correlation in found.rank_correlations.items():
        masses, values = zip(
            *((each.mass_share, each.effect.value) for each in found.effects if each.label == label), strict=True
        )
        ranks = [np.argsort(np.argsort(column)) for column in (masses, values)]
        assert correlation == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])
    assert found.mean_correlation == pytest.approx(np.mean(list(found.rank_correlations.values())))
    few = ablate(model, token_ids[:40], record, AblationPlan(("top:2",)), num_bytes=40)
    assert few.mean_correlation is None and math.isfinite(few.bits_per_byte)


def test_words(model: CausalLM, token_ids: list[int]) -> None:
    record = read_routing(model, token_ids[:50])
    for word in ("3", "3:", "top:0", "all", "3:17+3:18", ""):
        with pytest.raises(UsageError, match="names no expert"):
            AblationPlan((word,)).check()
    for word in ("4:0", "0:8"):
        with pytest.raises(UsageError, match="no such layer"):
            AblationPlan((word,)).experts_of(record)
    assert AblationPlan(("top:99",)).experts_of(record) == {
        layer: np.argsort(-counts, kind="stable").tolist() for layer, counts in enumerate(record.counts())
    }
    with pytest.raises(UsageError, match="one token"):
        ablate(model, [1], record, AblationPlan(("top:1",)), num_bytes=1)
