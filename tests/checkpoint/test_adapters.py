"""Adapters on disk beside PEFT and transformers: the same files, the same logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.checkpoint.adapters import TENSOR_FILE, is_adapter, open_adapter, read_adapter, save_adapter
from qnext.checkpoint.files import write_tensors
from qnext.checkpoint.reading import read_tensors
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, UsageError
from qnext.lora import LoraConfig, adapter_of, attach
from qnext.model import CausalLM
from tests.lora.models import CONFIG, LORAS, outputs_of, with_random_lora
from tests.model.models import logits_of, make_model, make_peer, random_tokens
from tests.ops.compare import randn, relative_rms

TRUNK = replace(CONFIG, num_nextn_predict_layers=0)
# Sums in another order; PEFT adds W + B A first.
TOLERANCE = 1e-5


@pytest.fixture
def peft() -> Iterator[Any]:
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


def theirs(peft: Any, model: CausalLM, folder: Path) -> Tensor:
    """Logits of transformers with the adapter in `folder`. A tensor that PEFT did not load is an error."""
    peer = peft.PeftModel.from_pretrained(make_peer(model), str(folder))
    loaded = peft.get_peft_model_state_dict(peer)
    written = {name: tensor for name, tensor in read_tensors(folder / TENSOR_FILE).items() if ".mtp." not in name}
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    return peer(random_tokens(model.config, 20)[None]).logits[0]


@pytest.mark.parametrize("lora", list(LORAS))
@torch.no_grad()
def test_peft_reads_what_we_write(lora: str, peft: Any, tmp_path: Path) -> None:
    model = with_random_lora(make_model(CONFIG), LORAS[lora])
    save_adapter(adapter_of(model), tmp_path / "adapter", model.config, base="somewhere")
    ours = logits_of(model, random_tokens(CONFIG, 20))
    found = theirs(peft, make_model(CONFIG), tmp_path / "adapter")
    assert relative_rms(ours, found) <= TOLERANCE
    assert relative_rms(logits_of(make_model(CONFIG), random_tokens(CONFIG, 20)), found) > 0.05


TARGETS: dict[str, dict[str, Any]] = {
    "everything": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
        "target_parameters": [
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "mlp.gate.weight",
            "mlp.shared_expert.up_proj.weight",
        ],
        "rank_pattern": {"q_proj": 2, "in_proj_ba": 3},
        "alpha_pattern": {"q_proj": 5.0, "mlp.gate.weight": 1.0},
    },
    "experts, only down": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "experts, only gate and up": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "one layer, rank-stabilised": {
        "target_modules": ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.shared_expert_gate"],
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("targets", list(TARGETS))
@torch.no_grad()
def test_we_read_what_peft_writes(targets: str, peft: Any, tmp_path: Path) -> None:
    plain = make_model(TRUNK)
    config = peft.LoraConfig(r=4, lora_alpha=6, **TARGETS[targets])
    peer = peft.get_peft_model(make_peer(plain), config)
    for i, (name, parameter) in enumerate(peer.named_parameters()):
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    peer.save_pretrained(tmp_path)
    attach(plain, read_adapter(tmp_path, TRUNK))
    tokens = random_tokens(TRUNK, 20)
    wanted = peer(tokens[None]).logits[0]
    assert relative_rms(logits_of(plain, tokens), wanted) <= TOLERANCE
    assert relative_rms(logits_of(make_model(TRUNK), tokens), wanted) > 0.01


@pytest.mark.parametrize("lora", list(LORAS))
def test_written_and_read_is_the_same_adapter(lora: str, tmp_path: Path) -> None:
    """Shared factors are shared again, experts without factors have none again, and MTP is there."""
    model, again = (with_random_lora(make_model(CONFIG), LORAS[lora]), make_model(CONFIG))
    adapter = adapter_of(model)
    save_adapter(adapter, tmp_path / "adapter", CONFIG, base=None)
    found = read_adapter(tmp_path / "adapter", CONFIG)
    assert found.parts.keys() == adapter.parts.keys()
    assert any(name.startswith("mtp.") for name in found.parts)
    for name, part in adapter.parts.items():
        for factor, wanted in zip(found.parts[name], part, strict=True):
            assert torch.equal(torch.as_tensor(factor), torch.as_tensor(wanted)), name
    assert found.places.keys() == adapter.places.keys()
    assert all(torch.equal(found.places[name], adapter.places[name]) for name in adapter.places)
    attach(again, found)
    assert torch.equal(outputs_of(again), outputs_of(model))


def test_factors_of_single_experts_are_read(tmp_path: Path) -> None:
    """The form of transformers 4: a pair for each projection of each expert, some of them missing."""
    names = [f"model.layers.0.mlp.experts.{e}.{half}_proj" for e in (1, 5) for half in ("gate", "up", "down")][:-1]
    width, hidden = CONFIG.moe_intermediate_size, CONFIG.hidden_size
    deltas, tensors = {}, {}
    for i, name in enumerate(names):
        inputs, outputs = (width, hidden) if "down" in name else (hidden, width)
        a, b = randn(3, inputs, seed=i, dtype=torch.float32), randn(outputs, 3, seed=90 + i, dtype=torch.float32)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        deltas[name] = 2.0 * b @ a
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    write_tensors(tmp_path / TENSOR_FILE, tensors)
    adapter = read_adapter(tmp_path, CONFIG)
    stem = "model.layers.0.mlp.experts"
    for expert in range(CONFIG.num_experts):
        gate_up, down = (adapter.delta(f"{stem}.{name}_proj", expert) for name in ("gate_up", "down"))
        if expert not in (1, 5):
            assert gate_up is None
            assert down is None
            continue
        assert gate_up is not None
        wanted = torch.cat([deltas[f"{stem}.{expert}.{half}_proj"] for half in ("gate", "up")])
        torch.testing.assert_close(gate_up, wanted)
        assert down is not None
        torch.testing.assert_close(down, deltas.get(f"{stem}.{expert}.down_proj", torch.zeros(hidden, width)))
    tensors[f"base_model.model.{names[0]}.lora_B.weight"] = torch.zeros(width, 2)
    (tmp_path / TENSOR_FILE).unlink()
    write_tensors(tmp_path / TENSOR_FILE, tensors)
    with pytest.raises(CorruptCheckpoint, match=r"experts\.1\.gate_proj"):
        read_adapter(tmp_path, CONFIG)


def saved(folder: Path) -> Path:
    model = with_random_lora(make_model(CONFIG), LoraConfig("attention", rank=2))
    save_adapter(adapter_of(model), folder, CONFIG, base="the-base")
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """By the end of a name in the first layer; None takes the tensor away."""
    tensors = read_tensors(folder / TENSOR_FILE)
    for key, tensor in changes.items():
        (name,) = [name for name in tensors if name.endswith(f"layers.0.linear_attn.{key.replace('__', '.')}.weight")]
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    (folder / TENSOR_FILE).unlink()
    write_tensors(folder / TENSOR_FILE, tensors)


@pytest.mark.parametrize(
    ("changes", "error", "culprit"),
    [
        ({"peft_type": "LOHA"}, NotSupported, "peft_type: 'LOHA'"),
        ({"use_dora": True}, NotSupported, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, NotSupported, "modules_to_save"),
        ({"bias": "all"}, NotSupported, "bias"),
        ({"lora_alpha": "much"}, CorruptCheckpoint, "lora_alpha"),
        ({"lora_alpha": 0}, CorruptCheckpoint, "lora_alpha"),
        ({"alpha_pattern": {"out_proj": True}}, CorruptCheckpoint, "out_proj"),
        ({"alpha_pattern": [1]}, CorruptCheckpoint, "alpha_pattern"),
    ],
)
def test_a_configuration_that_is_not_read_is_named(
    changes: dict[str, Any], error: type[Exception], culprit: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "adapter")
    change_config(folder, **changes)
    with pytest.raises(error, match=culprit):
        read_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"out_proj__lora_B": None}, r"linear_attn\.out_proj\.lora_A"),
        ({"out_proj__lora_B": torch.zeros(64, 3)}, r"linear_attn\.out_proj"),
        ({"out_proj__lora_A": torch.zeros(2, 7)}, r"linear_attn\.out_proj"),
        ({"out_proj__lora_B": torch.full((64, 2), float("nan"))}, "not finite"),
        ({"out_proj__lora_B": torch.zeros(64, 2, dtype=torch.int32)}, "not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(changes: dict[str, Tensor | None], culprit: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    change_tensors(folder, **changes)
    with pytest.raises(CorruptCheckpoint, match=culprit):
        read_adapter(folder, CONFIG)


def test_folders(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    assert is_adapter(folder)
    assert open_adapter(folder).base == "the-base"
    with pytest.raises(UsageError, match="not empty"):
        saved(folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(ModelNotFound, match=r"adapter_config\.json"):
        open_adapter(tmp_path / "other")
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(CorruptCheckpoint, match="missing"):
        open_adapter(folder)
