"""Tensors under the names and in the stacks that other programs write: the same model, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.quantize import quantize_folder
from qnext.errors import CorruptCheckpoint, NotSupported, QnextWarning
from qnext.quant.scheme import make_policy

from .folders import CONFIGS, make_fp8, rewrite, tiny_folder, tiny_model
from .test_load import assert_same_weights

Tensors = dict[str, Tensor]
_EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(gate|up|down)_proj\.(weight\S*)")


def _stacks(tensors: Tensors) -> dict[tuple[str, str, str], list[Tensor]]:
    """Takes the experts out: their matrices by place, projection and what they hold, in the order of the experts."""
    found: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for name in list(tensors):
        match = _EXPERT.fullmatch(name)
        if match is not None:
            key = (match[1], match[3], match[4])
            found.setdefault(key, {})[int(match[2])] = tensors.pop(name)
    return {key: [stack[i] for i in sorted(stack)] for key, stack in found.items()}


def fuse(tensors: Tensors, *, end: str = "") -> None:
    stacks = _stacks(tensors)
    for (prefix, kind, what), stack in stacks.items():
        after = what.removeprefix("weight") if not end else f"{end}{what.removeprefix('weight')}"
        if kind == "down":
            tensors[f"{prefix}experts.down_proj{after}"] = torch.stack(stack)
        elif kind == "gate":
            both = zip(stack, stacks[prefix, "up", what], strict=True)
            tensors[f"{prefix}experts.gate_up_proj{after}"] = torch.stack([torch.cat(pair) for pair in both])


def _switch(tensors: Tensors) -> None:
    for (prefix, kind, _), stack in _stacks(tensors).items():
        tensors[f"{prefix}switch_mlp.{kind}_proj.weight"] = torch.stack(stack)


def _per_projection(tensors: Tensors) -> None:
    for (prefix, kind, _), stack in _stacks(tensors).items():
        tensors[f"{prefix}experts.{kind}_proj"] = torch.stack(stack)


def _pairs(tensors: Tensors) -> None:
    """Gate and up of every expert in one matrix."""
    stacks = _stacks(tensors)
    for (prefix, kind, _), stack in stacks.items():
        for i, matrix in enumerate(stack):
            if kind == "down":
                tensors[f"{prefix}experts.{i}.down_proj.weight"] = matrix
            elif kind == "gate":
                both = [matrix, stacks[prefix, "up", "weight"][i]]
                tensors[f"{prefix}experts.{i}.gate_up_proj.weight"] = torch.cat(both)


def _letters(tensors: Tensors) -> None:
    words = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "gate_up_proj": "w13"}
    for name in list(tensors):
        if ".mlp.experts." in name:
            tensors[re.sub(r"(gate_up|gate|up|down)_proj", lambda m: words[m[0]], name)] = tensors.pop(name)


def _stacked_letters(tensors: Tensors) -> None:
    fuse(tensors)
    _letters(tensors)
    _rename(lambda name: f"{name}_weight" if name.endswith((".w13", ".w2")) else name)(tensors)


def _pairs_in_letters(tensors: Tensors) -> None:
    _pairs(tensors)
    _letters(tensors)


def _rename(change: Callable[[str], str]) -> Callable[[Tensors], None]:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return rename


def _both(tensors: Tensors) -> None:
    fuse(tensors)
    _rename(lambda name: re.sub(r"^model\.", "model.language_model.", name))(tensors)


FORMS: dict[str, Callable[[Tensors], None]] = {
    "fused": fuse,
    "fused, called weight": lambda tensors: fuse(tensors, end=".weight"),
    "one tensor per projection": _per_projection,
    "mlx's stacks": _switch,
    "model.language_model.": _rename(lambda name: re.sub(r"^model\.", "model.language_model.", name)),
    "language_model., head inside": _rename(lambda name: f"language_model.{name}"),
    "language_model.model., head outside": _rename(lambda name: re.sub(r"^model\.", "language_model.model.", name)),
    "model.language_model., head inside": _rename(
        lambda name: re.sub(r"^(model|lm_head|mtp)\.", lambda m: f"model.language_model.{m[1]}.", name)
    ),
    "data parallel": _rename(lambda name: f"module.{name}"),
    "compiled": _rename(lambda name: f"_orig_mod.{name}"),
    "FSDP": _rename(
        lambda name: "_fsdp_wrapped_module." + re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", name)
    ),
    "checkpointed": _rename(lambda name: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name)),
    "PEFT, merged": _rename(lambda name: f"base_model.model.{name}"),
    "no prefix": _rename(lambda name: name.removeprefix("model.")),
    "actor": _rename(lambda name: f"actor.{name}"),
    "fused and prefixed": _both,
    "gate and up of an expert together": _pairs,
    "w1, w2, w3": _letters,
    "w13_weight, w2_weight": _stacked_letters,
    "w13 of each expert": _pairs_in_letters,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["next", "moe tied"])
def test_other_names_are_the_same_model(tmp_path: Path, name: str, form: str) -> None:
    folder = tiny_folder(tmp_path / "m", name)
    rewrite(folder, FORMS[form])
    assert_same_weights(load_model(folder), tiny_model(name))


def test_gate_and_up_of_dense_layers_together(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "dense")

    def pair(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("mlp.gate_proj.weight")]:
            up = tensors.pop(name.replace("gate_proj", "up_proj"))
            tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensors.pop(name), up])

    rewrite(folder, pair)
    assert_same_weights(load_model(folder), tiny_model("dense"))


@pytest.mark.parametrize("part", ["visual.blocks.0.norm1.weight", "vision_tower.x.weight", "audio_tower.conv.weight"])
def test_other_modalities_beside_the_keys_of_the_text_model(tmp_path: Path, part: str) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    rewrite(folder, lambda tensors: tensors.update({f"model.{part}": torch.ones(3)}))
    with pytest.warns(QnextWarning, match="outside the language model"):
        assert_same_weights(load_model(folder), tiny_model("moe"))


def test_dense_layers_beside_experts_keep_their_names(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "next, dense layer")
    rewrite(folder, _both)
    assert_same_weights(load_model(folder), tiny_model("next, dense layer"))


def test_fused_experts_in_fp8_come_with_fused_scales(tmp_path: Path) -> None:
    """Where an expert's width is a whole number of blocks; there, gate and up have scales of their own."""
    from dataclasses import replace

    from qnext.checkpoint import save_model
    from qnext.model import CausalLM, initialize

    model = CausalLM(replace(CONFIGS["moe"], moe_intermediate_size=256, hidden_size=136))
    initialize(model, seed=3)
    save_model(model, tmp_path / "m")
    make_fp8(tmp_path / "m")
    expected = load_model(tmp_path / "m")
    rewrite(tmp_path / "m", fuse)
    assert_same_weights(load_model(tmp_path / "m"), expected)
    # A narrow expert's gate and up would share a block of one scale.
    folder = tiny_folder(tmp_path / "n", "moe")
    make_fp8(folder)
    rewrite(folder, fuse)
    assert load_model(folder).config == CONFIGS["moe"]

    def share(tensors: Tensors) -> None:
        fuse(tensors)
        for name in [name for name in tensors if name.endswith("gate_up_proj_scale_inv")]:
            tensors[name] = tensors[name][:, :1].clone()

    rewrite(folder, share)
    with pytest.raises(NotSupported, match=r"gate_up_proj_scale_inv: its 1 rows do not part between gate and up"):
        load_model(folder)


def test_fused_experts_are_quantised_as_others(tmp_path: Path) -> None:
    policy = make_policy("int8-g32", head=None, is_tied=False)
    from dataclasses import replace

    from qnext.checkpoint import create_folder

    create_folder(replace(CONFIGS["moe"], hidden_size=64, moe_intermediate_size=32), tmp_path / "m", seed=1)
    quantize_folder(tmp_path / "m", tmp_path / "expected", policy=policy)
    rewrite(tmp_path / "m", _both)
    quantize_folder(tmp_path / "m", tmp_path / "made", policy=policy)
    with TensorFiles(tmp_path / "expected") as expected, TensorFiles(tmp_path / "made") as made:
        assert made.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(made.read(name), expected.read(name)) for name in made.tensors)


def test_transposed_experts_are_not_taken_for_others(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")

    def transpose(tensors: Tensors) -> None:
        fuse(tensors)
        for name in list(tensors):
            if ".mlp.experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()

    rewrite(folder, transpose)
    with pytest.raises(NotSupported, match=r"holds experts transposed, inputs first"):
        load_model(folder)


def test_experts_that_are_there_twice_are_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(folder, lambda t: t.update({name: torch.zeros(6, 40, 20)}))
    with pytest.raises(CorruptCheckpoint, match=rf"tensors \S+ and \S+ are both {name[:-10]}.0.down_proj.weight"):
        load_model(folder)


def test_one_expert_too_few_in_a_stack_is_missing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")

    def cut(tensors: Tensors) -> None:
        fuse(tensors)
        name = "model.layers.1.mlp.experts.down_proj"
        tensors[name] = tensors[name][:-1].clone()

    rewrite(folder, cut)
    with pytest.raises(CorruptCheckpoint, match=r"layers.1.mlp.experts.5.down_proj.weight is missing"):
        load_model(folder)


def test_a_wrapper_keeps_its_towers(tmp_path: Path) -> None:
    """A model of several modalities: its language model is loaded, the rest is passed over in one line."""
    folder = tiny_folder(tmp_path / "m", "moe")
    text = json.loads((folder / "config.json").read_text())
    wrapper = {"model_type": "some_vl", "architectures": ["SomeForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(wrapper))

    def wrap(tensors: Tensors) -> None:
        _rename(lambda name: re.sub(r"^model\.", "model.language_model.", name))(tensors)
        tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(3, 3)
        tensors["mm_projector.0.weight"] = torch.ones(3, 3)

    rewrite(folder, wrap)
    with pytest.warns(QnextWarning, match=r"outside the language model, ignored: tensor mm_projector.0.weight and"):
        assert_same_weights(load_model(folder), tiny_model("moe"))


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "value_model.0.bias"])
def test_heads_of_other_programs_are_passed_over(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m", "dense")
    rewrite(folder, lambda t: t.update({name: torch.full((3, 3), torch.nan)}))
    with pytest.warns(QnextWarning, match=f"ignored: tensor {name}"):
        assert_same_weights(load_model(folder), tiny_model("dense"))


@pytest.mark.parametrize("name", ["model.embed_norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.bias"])
def test_a_tensor_inside_the_language_model_is_not(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m", "dense")
    rewrite(folder, lambda t: t.update({name: torch.ones(3)}))
    with pytest.raises(CorruptCheckpoint, match=f"tensor {name} is surplus"):
        load_model(folder)
