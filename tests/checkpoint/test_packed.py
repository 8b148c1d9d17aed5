"""Quantised folders of other programs: the same numbers in every form, codes kept, faults named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import Capture, run
from model.models import PEER_CONFIGS, make_model
from torch import Tensor

from qnext import ops
from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.values import read_weight
from qnext.errors import ConfigError, CorruptCheckpoint, NotSupported, UsageError
from qnext.model import Batch, held_bytes, named_weights
from qnext.planning import list_parameters

from .folders import edit_config, rewrite, tiny_folder
from .packed_folders import FORMS, PackedForm, packed_folder, quantization_config, weights_of

GROUPED, AWQ, GPTQ = FORMS[0], FORMS[6], FORMS[7]
DOWN = "model.layers.0.mlp.experts.1.down_proj"
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"


@pytest.mark.filterwarnings("error::qnext.errors.QnextWarning")
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_gives_the_numbers_that_were_packed(tmp_path: Path, form: PackedForm, dequantize: bool) -> None:
    expected = packed_folder(tmp_path / "m", form)
    model = load_model(tmp_path / "m", dequantize=dequantize, dtype=torch.float32)
    infos = list_parameters(model.config)
    num_packed = 0
    for name, weight in weights_of(model).items():
        parts = [part for part in disk_parts(infos[name]) if part.name in expected]
        assert isinstance(weight, Tensor) == (dequantize or not parts), name
        values = ops.dequantize(weight, torch.float32)
        assert values.shape == infos[name].shape
        for part in parts:
            assert torch.equal(values[part.place], expected[part.name]), part.name
            num_packed += 1
    assert num_packed == len(expected) > 20


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_and_their_numbers_compute_alike(tmp_path: Path, form: PackedForm) -> None:
    """Kernels round activations to 8 bits for codes, so the comparison is loose; a wrong layout would be of order 1."""
    packed_folder(tmp_path / "m", form)
    batch = Batch.from_lengths(torch.arange(20), [7, 13])
    with torch.no_grad():
        logits = []
        for dequantize in (False, True):
            model = load_model(tmp_path / "m", dtype=torch.float32, dequantize=dequantize)
            assert model.dtype == torch.float32
            logits.append(model.logits(model(batch).hidden_TD))
    error = (logits[0] - logits[1]).square().mean().sqrt() / logits[1].square().mean().sqrt()
    assert error < 0.1


def test_memory_is_counted_in_codes(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m", GROUPED)
    packed, plain = (load_model(tmp_path / "m", dequantize=dequantize) for dequantize in (False, True))
    quantized = sum(
        weight.numel() for name, weight in plain.named_parameters() if not isinstance(weights_of(packed)[name], Tensor)
    )
    # 16 bits a number become 4 and a scale of 16 bits for 16 of them; the kernels' panels may be padded
    saved = held_bytes(plain) - held_bytes(packed)
    assert 0.9 * quantized * (2 - 5 / 8) <= saved <= quantized * (2 - 5 / 8)


def test_dtype_of_what_is_not_packed(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m", AWQ, dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(tmp_path / "m").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path / "m", dequantize=True).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path / "m", dtype=torch.float32).parameters()} == {torch.float32}


def test_codes_stay_codes_on_another_device(tmp_path: Path) -> None:
    """In the order of the disk: the panels are those of the CPU's kernels."""
    packed_folder(tmp_path / "m", GROUPED)
    weights = dict(named_weights(load_model(tmp_path / "m", device="meta")))
    assert weights and all(isinstance(weight, ops.QuantizedWeight) for weight in weights.values())
    assert {tensor.device.type for weight in weights.values() for tensor in weight.tensors} == {"meta"}


def test_a_gate_that_was_packed_becomes_a_tensor(tmp_path: Path) -> None:
    """Programs differ on whether the gates are linear layers; the tensors decide."""
    name = "model.layers.1.mlp.shared_expert_gate"

    def pack_gate(tensors: dict[str, Tensor]) -> None:
        weight = tensors.pop(f"{name}.weight").float()
        scale = weight.abs().max() / 7
        codes = (weight / scale).round().to(torch.int64) + 8
        nibbles = codes.view(-1, 8) << (4 * torch.arange(8))
        word = nibbles.sum(-1)
        tensors[f"{name}.weight_packed"] = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)[None]
        tensors[f"{name}.weight_scale"] = scale.expand(1, 3).clone()
        tensors[f"{name}.weight_shape"] = torch.tensor([1, 48])

    folder = tmp_path / "m"
    packed_folder(folder, GROUPED, change=pack_gate)
    config = quantization_config(GROUPED)
    config["ignore"] = [pattern for pattern in config["ignore"] if "shared_expert_gate" not in pattern]
    edit_config(folder, quantization_config=config)
    plain = load_model(folder, dtype=torch.float32).get_submodule(name).weight
    assert isinstance(plain, torch.nn.Parameter)
    assert plain.abs().max() > 0


def test_every_weight_can_be_read_alone(tmp_path: Path) -> None:
    expected = packed_folder(tmp_path / "m", GPTQ)
    with TensorFiles(tmp_path / "m") as files:
        layout = read_layout(tmp_path / "m")
        for name in layout.targets:
            values = read_weight(layout, files, name, dtype=torch.float32)
            assert torch.equal(values, expected.get(name, values))


def _set(key: str, value: Any) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = value(tensors[key]) if callable(value) else value

    return change


def _first(value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def _huge_scales(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        tensors[key] = torch.full(tensors[key].shape, 3e38, dtype=torch.bfloat16)


DAMAGES: dict[str, tuple[PackedForm, Any, str]] = {
    "infinite scale": (GROUPED, _set(f"{DOWN}.weight_scale", _first(float("inf"))), "weight_scale holds NaN or inf"),
    "nan scale": (AWQ, _set(f"{DOWN}.scales", _first(float("nan"))), "scales holds NaN or infinity"),
    "scale too large": (
        GROUPED,
        _huge_scales,
        "a scale beyond what codes of 4 bits",
    ),
    "scale of another dtype": (
        GROUPED,
        _set(f"{DOWN}.weight_scale", torch.zeros(48, 2, dtype=torch.float64)),
        "has dtype F64, not BF16",
    ),
    "scales of another group": (
        GROUPED,
        _set(f"{DOWN}.weight_scale", torch.ones(48, 4)),
        r"shape \[48, 4\].*asks for \[48, 2\]",
    ),
    "codes too short": (
        GROUPED,
        _set(f"{DOWN}.weight_packed", torch.zeros(48, 3, dtype=torch.int32)),
        r"asks for \[48, 4\]",
    ),
    "codes of floats": (GROUPED, _set(f"{DOWN}.weight_packed", torch.zeros(48, 4)), "has dtype F32, not I32"),
    "shape that lies": (
        GROUPED,
        _set(f"{DOWN}.weight_shape", torch.tensor([48, 31])),
        r"says \[48, 31\], config.json asks for",
    ),
    "no scale": (GROUPED, lambda t: t.pop(f"{DOWN}.weight_scale"), r"weight_scale is missing \(pack-quantized int4"),
    "no codes": (GROUPED, lambda t: t.pop(f"{DOWN}.weight_packed"), r"down_proj.weight is missing"),
    "zeros nobody asked for": (
        GROUPED,
        lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(6, 2, dtype=torch.int32)}),
        "weight_zero_point holds zeros other than 8",
    ),
    "a group that is not there": (GPTQ, _set(f"{DOWN}.g_idx", _first(2)), r"g_idx names a group beyond the 2"),
    "a group below all": (GPTQ, _set(f"{DOWN}.g_idx", _first(-1)), r"g_idx names a group beyond the 2"),
    "zeros of a symmetric gptq": (
        GPTQ,
        _set(f"{DOWN}.qzeros", _first(0)),
        "qzeros holds zeros other than 8, but quantization_config.sym",
    ),
    "both": (
        GPTQ,
        lambda t: t.update({f"{QKVZ}.weight": torch.zeros(64, 48)}),
        r"is there beside .*qkvz.qweight",
    ),
    "codes beyond four bits": (FORMS[5], _set(f"{DOWN}.weight", _first(8)), "holds numbers beyond 4 bits"),
    "packed embedding": (
        GROUPED,
        lambda t: t.update({"model.embed_tokens.weight_packed": torch.zeros(1, dtype=torch.int32)}),
        "embed_tokens cannot be packed",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    form, change, message = DAMAGES[name]
    folder = tmp_path / "m"
    packed_folder(folder, form, change=change)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def _weights(**changes: Any) -> dict[str, Any]:
    config = quantization_config(GROUPED)
    config["config_groups"]["group_0"]["weights"].update(changes)
    return config


CONFIGS: dict[str, tuple[PackedForm, dict[str, Any], str]] = {
    "group size zero": (GROUPED, _weights(group_size=0), r"weights.group_size: must be positive"),
    "group size negative": (GROUPED, _weights(group_size=-16), r"group_size: must be positive, or -1"),
    "group size huge": (GROUPED, _weights(group_size=2**63), r"group_size: must be positive"),
    "group size of text": (GROUPED, _weights(group_size="16"), r"group_size: must be an integer"),
    "group that does not divide": (GROUPED, _weights(group_size=20), r"inputs are no whole number of groups of 20"),
    "other group": (GROUPED, _weights(group_size=8), r"weight_scale has shape"),
    "eight for four": (GROUPED, _weights(num_bits=8), r"weight_packed has shape"),
    "asymmetric without zeros": (GROUPED, _weights(symmetric=False), r"weight_zero_point is missing"),
    "a pattern that never ends": (
        GROUPED,
        {**quantization_config(GROUPED), "ignore": ["re:(.*.*)*x"]},
        r"could take too long",
    ),
    "no pattern": (GROUPED, {**quantization_config(GROUPED), "ignore": ["re:("]}, r"no regular expression"),
    "ignore is no list": (GROUPED, {**quantization_config(GROUPED), "ignore": "lm_head"}, r"ignore: must be a list"),
    "gptq of other bits by module": (
        GPTQ,
        {**quantization_config(GPTQ), "dynamic": {r"+:.*down_proj": {"bits": 8}}},
        r"down_proj.* has shape",
    ),
    "gptq of two formats": (GPTQ, {**quantization_config(GPTQ), "format": "gptq_v2"}, r"contradicts checkpoint_format"),
    "gptq declared as awq": (GPTQ, quantization_config(AWQ), r"qweight is GPTQ's, of which"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    form, config, message = CONFIGS[name]
    folder = tmp_path / "m"
    packed_folder(folder, form)
    edit_config(folder, quantization_config=config)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


NOT_SUPPORTED: dict[str, tuple[PackedForm, dict[str, Any], str]] = {
    "bits": (GROUPED, _weights(num_bits=9), r"num_bits: 9 is not supported, only 2, 3, 4"),
    "floats as integers": (GROUPED, _weights(type="float"), r"weights.type: 'float' is not supported for pack-quant"),
    "strategy": (GROUPED, _weights(strategy="attn_head"), r"strategy: 'attn_head' is not supported"),
    "format": (
        GROUPED,
        {**quantization_config(GROUPED), "format": "marlin-24"},
        r"format: 'marlin-24' is not supported",
    ),
    "rotations": (
        GROUPED,
        {**quantization_config(GROUPED), "transform_config": {"config_groups": {"u": {}}}},
        r"transform_config: rotated weights are not supported",
    ),
    "sparse": (
        GROUPED,
        {**quantization_config(GROUPED), "sparsity_config": {"format": "sparse-24-bitmask"}},
        r"sparsity_config.format: 'sparse-24-bitmask' is not supported",
    ),
    "awq of another layout": (AWQ, {**quantization_config(AWQ), "version": "gemv"}, r"version: 'gemv' is not"),
    "awq of eight bits": (AWQ, {**quantization_config(AWQ), "bits": 8}, r"bits: 8 is not supported, only 4"),
    "gptq for one kernel": (
        GPTQ,
        {**quantization_config(GPTQ), "checkpoint_format": "marlin"},
        r"checkpoint_format: 'marlin' is not",
    ),
    "gptq with an adapter": (GPTQ, {**quantization_config(GPTQ), "adapter": {"rank": 8}}, r"adapter: .* is not supp"),
}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_is_sound_but_not_implemented_is_no_damage(tmp_path: Path, name: str) -> None:
    form, config, message = NOT_SUPPORTED[name]
    folder = tmp_path / "m"
    packed_folder(folder, form)
    edit_config(folder, quantization_config=config)
    with pytest.raises(NotSupported, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_packed_without_a_declaration(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    packed_folder(folder, GPTQ)
    edit_config(folder, quantization_config=None)
    with pytest.raises(CorruptCheckpoint, match=r"qweight is part of a packed weight, but config.json has no quant"):
        load_model(folder)


def test_many_missing_experts_are_not_listed(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    edit_config(folder, num_experts=2**40)
    with pytest.raises(ConfigError, match=rf"num_experts: {2**40} asks for \d+ tensors, the folder holds"):
        load_model(folder)


@pytest.mark.parametrize("form", [GROUPED, AWQ, GPTQ], ids=str)
def test_mtp_may_be_plain_beside_a_packed_trunk(tmp_path: Path, form: PackedForm) -> None:
    """Quantisers do not see the module; whoever adds it back does not always list it."""
    folder = tmp_path / "m"
    expected = packed_folder(folder, form)

    def unpack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in expected if name.startswith("mtp.")]:
            module = name.removesuffix("weight")
            for key in [key for key in tensors if key.startswith(module)]:
                del tensors[key]
            tensors[name] = expected[name].to(torch.bfloat16)

    rewrite(folder, unpack)
    weights = weights_of(load_model(folder))
    assert all(isinstance(weights[name], Tensor) for name in weights if name.startswith("mtp."))
    assert not isinstance(weights["model.layers.0.mlp.experts.down_proj"], Tensor)


@pytest.mark.parametrize("form", [GROUPED, AWQ, GPTQ], ids=str)
def test_inspect_counts_numbers_and_not_words(tmp_path: Path, capsys: Capture, form: PackedForm) -> None:
    expected = packed_folder(tmp_path / "m", form)
    result = run(capsys, "inspect", tmp_path / "m", "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    layout = "pack-quantized" if form is GROUPED else form.layout
    assert document["packed"] == {f"{layout} int4-g16": sum(weight.numel() for weight in expected.values())}
    assert "packed weights: " in run(capsys, "inspect", tmp_path / "m").out


def test_verify_reads_packed_values(tmp_path: Path, capsys: Capture) -> None:
    """The folder has no tokenizer, which is a line of its own."""
    packed_folder(tmp_path / "m", GPTQ)
    assert len(json.loads(run(capsys, "verify", tmp_path / "m", "--json").out)["problems"]) == 1

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"] + 1
        tensors[f"{DOWN}.scales"][0, 0] = float("inf")

    rewrite(tmp_path / "m", damage)
    problems = "\n".join(json.loads(run(capsys, "verify", tmp_path / "m", "--json").out)["problems"])
    assert f"{DOWN}.g_idx names a group beyond" in problems
    assert f"{DOWN}.scales holds NaN or infinity" in problems


def test_a_model_with_codes_is_not_saved(tmp_path: Path) -> None:
    model = make_model(PEER_CONFIGS["next"])
    codes, scales = torch.zeros(101, 48, dtype=torch.uint8), torch.ones(101, 3)
    model.lm_head.set_weight("weight", ops.QuantizedWeight(codes, scales, bits=8, group_size=16))
    with pytest.raises(UsageError, match="quantised weights is not saved; load it with dequantize=True"):
        save_model(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
