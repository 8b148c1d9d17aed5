"""An adapted model in the training loop: only its factors move, and what no gradient reaches is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qnext.checkpoint.snapshot import load_snapshot
from qnext.lora import LoraConfig, adapter_of, add_lora, describe_adapter, lora_parameters, train_only
from qnext.lora.report import NoEffect
from qnext.model import CausalLM
from qnext.planning import Kind, list_parameters
from qnext.training import NextToken, PackedStream, TrainConfig, Trainer, decay_table, parameter_rules

from .models import documents, tiny_model


def train(model: CausalLM, *, steps: int = 2, **changes: Any) -> Trainer:
    # What "auto" would take is timed, and near the border one run takes another precision than the next.
    form = {"precision": "float32", "tokens_per_batch": 24, "sequence_length": 16}
    config = TrainConfig(lr=1e-2, total_steps=steps, **{**form, **changes})
    stream = PackedStream(documents([9, 20, 5, 13]), tokens_per_batch=24, sequence_length=16, seed=0)
    trainer = Trainer(model, stream, config, objective=NextToken.of(config))
    trainer.run()
    return trainer


@pytest.mark.parametrize("shares_outer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_factors_move(dtype: torch.dtype, shares_outer: bool) -> None:
    model = tiny_model(dtype=dtype)
    add_lora(model, LoraConfig("all", rank=4, shares_outer=shares_outer))
    factors = lora_parameters(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == factors.keys()
    assert {parameter.dtype for parameter in factors.values()} == {torch.float32}
    report = describe_adapter(adapter_of(model))
    report.check()
    assert all(0 < changed <= of_all == 6 for changed, of_all in report.experts.values())


def test_experts_without_tokens_stay_as_they_were() -> None:
    """One document of few tokens reaches few experts; the others' changes are exactly zero."""
    model = tiny_model(num_experts=40, num_experts_per_tok=1, num_nextn_predict_layers=0)
    add_lora(model, LoraConfig("experts"))
    train(model, steps=1)
    report = describe_adapter(adapter_of(model))
    report.check()
    assert all(0 < changed < 25 for changed, _ in report.experts.values())


def test_mtp_that_no_loss_reaches_is_named() -> None:
    model = tiny_model()
    add_lora(model, LoraConfig("attention"))
    train(model, mtp_coefficient=0.0)
    with pytest.raises(NoEffect, match=r"mtp\.layers\.0\.self_attn"):
        describe_adapter(adapter_of(model)).check()


def test_micro_batches_side_by_side_train_the_same_adapter() -> None:
    found = []
    for parallel in (1, 2):
        model = tiny_model()
        add_lora(model, LoraConfig("all"))
        train(model, accumulation=2, parallel_batches=parallel, balance_coefficient=0.0)
        found.append(adapter_of(model).parts)
    for name, part in found[0].items():
        torch.testing.assert_close(part.B, found[1][name].B, rtol=1e-3, atol=1e-5)


def test_an_adapted_run_resumes_bit_for_bit(tmp_path: Any) -> None:
    def make() -> Trainer:
        model = tiny_model()
        add_lora(model, LoraConfig("all"))
        config = TrainConfig(lr=1e-2, tokens_per_batch=24, sequence_length=16, total_steps=4)
        stream = PackedStream(documents([9, 20, 5, 13]), tokens_per_batch=24, sequence_length=16, seed=0)
        return Trainer(model, stream, config, objective=NextToken.of(config), folder=tmp_path)

    whole, half = make(), make()
    whole.run()
    half.run(until_step=2)
    path = half.save()
    again = make()
    again.resume(path)
    again.run()
    for name, parameter in lora_parameters(whole.model).items():
        assert torch.equal(parameter, lora_parameters(again.model)[name]), name
    assert load_snapshot(path).tensors["model"].keys() == lora_parameters(whole.model).keys()


def test_the_decay_table_has_no_decay_for_factors() -> None:
    model = tiny_model()
    add_lora(model, LoraConfig("all"))
    (row,) = decay_table(parameter_rules(model, optimizer="muon"))
    assert (row.kind, row.has_decay, row.algorithm) == ("LoRA factors", False, "adamw")
    assert row.num_parameters == sum(parameter.numel() for parameter in lora_parameters(model).values())


@pytest.mark.parametrize("kind", list(Kind))
def test_one_kind_alone_can_be_trained(kind: Kind) -> None:
    """Expert-only tuning is the case that people ask for; a step of each kind moves it, and nothing else."""
    model = tiny_model(tie_word_embeddings=False, attention_bias=True)
    infos = list_parameters(model.config)
    wanted = {name for name, info in infos.items() if info.kind is kind}
    if not wanted:
        assert kind in (Kind.MLP_GATE, Kind.MLP_UP, Kind.MLP_DOWN)
        return
    train_only(model, {kind})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, steps=1)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == wanted
