"""Experts that data is sent to, and what a report says of an adapter."""

from __future__ import annotations

import pytest
import torch

from qnext.errors import UsageError
from qnext.lora import (
    LoraConfig,
    adapter_of,
    add_lora,
    choose_experts,
    count_routing,
    describe_adapter,
    lora_parameters,
)
from qnext.lora.report import NoEffect
from qnext.model import Batch, Router
from tests.model.models import make_model, plain_config, random_tokens

from .models import CONFIG, EXPERTS, LORAS, with_random_lora


def test_routing_is_counted() -> None:
    """Each router sends each token to top-k experts; the routers' own logits say which."""
    model = make_model(CONFIG)
    tokens_T = random_tokens(CONFIG, 30)
    batches = [Batch.from_lengths(part, [len(part) - 4, 4]) for part in tokens_T.split([18, 12])]
    seen: list[torch.Tensor] = []
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.register_forward_hook(lambda module, inputs, output: seen.append(output.routing.experts_TA))
    counts_LE = count_routing(model, batches)
    assert counts_LE.shape == (3, CONFIG.num_experts)
    assert counts_LE.sum(1).tolist() == [30 * CONFIG.num_experts_per_tok] * 3
    for layer in range(3):
        chosen = torch.cat([seen[layer].flatten(), seen[layer + 3].flatten()])
        assert torch.equal(counts_LE[layer], chosen.bincount(minlength=CONFIG.num_experts))


def test_the_fewest_experts_that_cover_are_chosen() -> None:
    model = make_model(CONFIG)
    counts_LE = torch.tensor([[0, 5, 1, 4, 0, 0, 0, 0], [1] * 8, [9, 0, 0, 0, 0, 0, 0, 1]])
    assert choose_experts(model, counts_LE, coverage=0.5) == {0: (1,), 1: (0, 1, 2, 3), 2: (0,)}
    assert choose_experts(model, counts_LE, coverage=0.51) == {0: (1, 3), 1: (0, 1, 2, 3, 4), 2: (0,)}
    assert choose_experts(model, counts_LE, coverage=1.0)[0] == (1, 2, 3)
    with pytest.raises(UsageError, match="coverage"):
        choose_experts(model, counts_LE, coverage=0.0)
    with pytest.raises(UsageError, match="no routed experts"):
        count_routing(make_model(plain_config()), [])


def test_an_adapter_without_effect_is_an_error() -> None:
    model = make_model(CONFIG)
    add_lora(model, LoraConfig("attention"))
    report = describe_adapter(adapter_of(model))
    assert set(report.without_effect) == adapter_of(model).parts.keys()
    with pytest.raises(NoEffect, match=r"layers\.0\.linear_attn.*more of"):
        report.check()


def test_one_part_without_effect_is_an_error() -> None:
    model = with_random_lora(make_model(CONFIG), LORAS["attention"])
    describe_adapter(adapter_of(model)).check()
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.lora_B").zero_()
    with pytest.raises(NoEffect, match=r"nothing in model\.layers\.1\.self_attn\.k_proj\.weight: no gradient"):
        describe_adapter(adapter_of(model)).check()


@pytest.mark.parametrize("lora", ["some experts, shared outer", "some experts, own factors"])
def test_the_report_counts_experts(lora: str) -> None:
    model = with_random_lora(make_model(CONFIG), LORAS[lora])
    own = "B" if not LORAS[lora].shares_outer else "A"
    with torch.no_grad():
        model.get_parameter(f"model.layers.0.mlp.experts.down_lora_{own}")[1].zero_()
    report = describe_adapter(adapter_of(model))
    report.check()
    counts = [counted for name, counted in report.experts.items() if "down" in name]
    assert [of_all for _, of_all in counts] == [len(experts) for experts in EXPERTS.values()]
    assert [changed for changed, _ in counts] == [2, 1, 2]
    assert report.num_parameters == sum(parameter.numel() for parameter in lora_parameters(model).values())
    assert any("got gradient" in line for line in report.lines())
