"""Train every kind of parameter, save, load: nothing is lost, here and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.adapters import read_adapter, save_adapter
from qnext.checkpoint.merge import merge_folder
from qnext.lora import LoraConfig, adapter_of, add_lora, describe_adapter, train_only
from qnext.model import Batch, CausalLM
from qnext.planning import Kind, list_parameters
from qnext.training import NextToken, PackedStream, TrainConfig, Trainer

from .models import VOCAB, documents, tiny_model

# Sums in another order, in fp32.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def train(model: CausalLM, *, steps: int = 1) -> None:
    config = TrainConfig(lr=1e-2, tokens_per_batch=24, sequence_length=16, total_steps=steps)
    stream = PackedStream(documents([9, 20, 5, 13]), tokens_per_batch=24, sequence_length=16, seed=0)
    Trainer(model, stream, config, objective=NextToken.of(config)).run()


def outputs_of(model: CausalLM) -> list[Tensor]:
    """Logits of trunk and MTP layer."""
    tokens_T = torch.arange(25) * 7 % VOCAB
    batch = Batch.from_lengths(tokens_T[:-1], [24])
    with torch.no_grad():
        trunk = model(batch)
        return [model.logits(trunk.hidden_TD), model.logits(model.draft_hidden(tokens_T[1:], trunk, batch))]


def assert_same_in_transformers(folder: Path, expected: Tensor) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs((torch.arange(24) * 7 % VOCAB)[None]).logits[0]
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def base_model() -> CausalLM:
    """Stored as released models are: matrices in bf16, the scalars of Gated DeltaNet in fp32."""
    model = tiny_model(tie_word_embeddings=False).to(torch.bfloat16)
    for name, info in list_parameters(model.config).items():
        if info.kind in (Kind.A_LOG, Kind.DT_BIAS, Kind.DELTA_NORM):
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float() + 1e-3
    return model


def test_every_kind_is_trained_and_kept(tmp_path: Path) -> None:
    """A step for each kind of parameter alone, then the folder: to the last bit here, to rounding in transformers."""
    model = tiny_model(tie_word_embeddings=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for kind in {info.kind for info in list_parameters(model.config).values()}:
        train_only(model, {kind})
        train(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == list_parameters(model.config).keys()
    assert any(name.startswith("mtp.") for name in changed)
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert again.get_parameter(name).dtype == torch.float32
    outputs = outputs_of(model)
    assert all(torch.equal(one, other) for one, other in zip(outputs_of(again), outputs, strict=True))
    assert_same_in_transformers(tmp_path / "out", outputs[0])


def test_an_adapter_of_every_kind_is_trained_merged_and_kept(tmp_path: Path) -> None:
    """Train, save the adapter, read it, merge it folder to folder: the logits of training, MTP and fp32 kept."""
    save_model(base_model(), tmp_path / "base")
    model = load_model(tmp_path / "base")
    stored: dict[str, Any] = {name: parameter.dtype for name, parameter in model.named_parameters()}
    add_lora(model, LoraConfig("all", rank=4, router=True))
    train(model, steps=3)
    adapter = adapter_of(model)
    describe_adapter(adapter).check()
    save_adapter(adapter, tmp_path / "adapter", model.config, base=str(tmp_path / "base"))
    merge_folder(tmp_path / "base", read_adapter(tmp_path / "adapter", model.config), tmp_path / "out")
    merged = load_model(tmp_path / "out")
    plain = load_model(tmp_path / "base")
    for name, parameter in merged.named_parameters():
        assert parameter.dtype == stored[name], name
        assert torch.equal(parameter, plain.get_parameter(name)) == (name not in adapter.parts), name
    assert {torch.float32, torch.bfloat16} == set(stored.values())
    assert any(name.startswith("mtp.") for name in adapter.parts)
    wide = load_model(tmp_path / "out", dtype=torch.float32)
    assert_same_in_transformers(tmp_path / "out", outputs_of(wide)[0])
    exact = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(plain.get_parameter(name))
            delta = _delta(adapter, name, parameter)
            parameter.copy_((parameter + delta).to(stored[name]))
    for one, other in zip(outputs_of(wide), outputs_of(exact), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def _delta(adapter: Any, name: str, parameter: Tensor) -> Tensor:
    part = adapter.parts.get(name)
    return torch.zeros_like(parameter) if part is None else part.scale * (part.B @ part.A)
