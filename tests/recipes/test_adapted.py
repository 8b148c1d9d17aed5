"""An adapter from words to a served folder: chosen experts, a few steps, saved, merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.merge import merge_adapter
from qnext.errors import UsageError
from qnext.lora import adapter_of
from qnext.lora.report import NoEffect
from qnext.model import Batch, CausalLM
from qnext.recipes.adapted import AdapterTask, adapt, save_adapted
from qnext.training import NextToken, PackedStream, TrainConfig, Trainer
from tests.training.models import VOCAB, documents, tiny_model


def make_stream() -> PackedStream:
    return PackedStream(documents([9, 20, 5, 13]), tokens_per_batch=24, sequence_length=16, seed=0)


def sample() -> Iterator[Batch]:
    stream = make_stream()
    return (stream.next_batch().batch for _ in range(2))


def train(model: CausalLM, *, steps: int = 3) -> None:
    config = TrainConfig(lr=1e-2, tokens_per_batch=24, sequence_length=16, total_steps=steps)
    Trainer(model, make_stream(), config, objective=NextToken.of(config)).run()


def logits_of(model: CausalLM) -> torch.Tensor:
    tokens_T = torch.arange(24) * 7 % VOCAB
    with torch.no_grad():
        return model.logits(model(Batch.from_lengths(tokens_T, [24])).hidden_TD)


@pytest.mark.parametrize("experts", ["all", "auto:coverage=0.5"])
def test_from_words_to_a_merged_folder(experts: str, tmp_path: Path) -> None:
    save_model(tiny_model(num_experts=12), tmp_path / "base")
    model = load_model(tmp_path / "base")
    told = adapt(model, AdapterTask("all", rank=2, experts=experts), sample(), seed=1)
    assert ("experts that get 50%" in told) == (experts != "all")
    sizes = {len(part.A) + len(part.B) - 1 for part in adapter_of(model).parts.values() if part.A.dim() == 3}
    assert (sizes == {12}) == (experts == "all")
    train(model)
    folder = save_adapted(
        adapter_of(model), model.config, tmp_path / "run", base=tmp_path / "base", tokenizer_folder=None
    )
    assert folder == tmp_path / "run" / "adapter"
    merge_adapter(tmp_path / "run", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-3, atol=1e-4)
    assert (logits_of(load_model(tmp_path / "base")) - logits_of(model)).abs().max() > 1e-2


def test_the_choice_of_experts_depends_on_the_data_alone() -> None:
    first, second = tiny_model(num_experts=12), tiny_model(num_experts=12)
    task = AdapterTask("experts", experts="auto", mtp=False)
    assert adapt(first, task, sample(), seed=1) == adapt(second, task, sample(), seed=1)
    ours, same = adapter_of(first), adapter_of(second)
    assert ours.places.keys() == same.places.keys() == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert all(torch.equal(ours.places[name], same.places[name]) for name in ours.places)


def test_what_was_not_trained_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    adapt(model, AdapterTask("attention"), sample(), seed=1)
    with pytest.raises(NoEffect, match="changes nothing"):
        save_adapted(adapter_of(model), model.config, tmp_path / "run", base="base", tokenizer_folder=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"targets": "everything"}, "lora must be one of all, attention, experts"),
        ({"experts": "some"}, "experts must be all or auto"),
        ({"experts": "auto:coverage=0"}, "experts must be all or auto"),
        ({"experts": "auto:coverage=1.5"}, "at most 1"),
        ({"rank": 0}, "rank"),
        ({"alpha": -1.0}, "alpha"),
    ],
)
def test_impossible_tasks_are_refused(values: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        AdapterTask(**values)
