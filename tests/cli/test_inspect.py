"""`qnext inspect`."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import pytest

from qnext.config import PRESETS, from_hf, preset

from .command import CONFIG, Capture, edit_json, make_model, run


@pytest.mark.parametrize("name", PRESETS)
def test_preset(capsys: Capture, name: str) -> None:
    result = run(capsys, "inspect", name, "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert from_hf(document["config"]) == preset(name)
    parameters = document["parameters"]
    listed = sum(prod(row["shape"]) * row["count"] for row in document["tensors"])
    assert listed == parameters["total"]
    parts = set(parameters) - {"total", "trunk", "active_without_head", "active_with_head"}
    assert sum(parameters[part] for part in parts) == parameters["total"]
    assert document["dtypes"] is None


def test_released_numbers(capsys: Capture) -> None:
    document = json.loads(run(capsys, "inspect", "80b-a3b", "--json").out)
    assert document["parameters"]["trunk"] == 79_674_391_296
    assert document["kv_bytes_per_1000_tokens"] == 1000 * 24 * 1024
    assert document["state_bytes_per_sequence"]["recurrent"] == 72 << 20
    assert sum(row["count"] for row in document["tensors"]) == 75_944
    rows = {row["name"]: row for row in document["tensors"]}
    assert rows["model.layers.*.mlp.experts.*.down_proj.weight"]["count"] == 48 * 512


def test_folder(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    document = json.loads(run(capsys, "inspect", folder, "--json").out)
    assert from_hf(document["config"]) == CONFIG
    assert document["dtypes"] == {"BF16": document["parameters"]["total"]}
    assert document["bytes"] == 2 * document["parameters"]["total"]
    assert {row["dtype"] for row in document["tensors"]} == {"BF16"}


def test_dtypes_by_part(tmp_path: Path, capsys: Capture) -> None:
    """Routers in fp32, outputs of attention in fp16, one expert in fp32 among others in bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith(".mlp.gate.weight") or ".experts.0.up_proj" in name:
                tensors[name] = tensors[name].float()
            elif name.endswith(".o_proj.weight"):
                tensors[name] = tensors[name].to(torch.float16)
        save_file(tensors, shard, metadata={"format": "pt"})
    document = json.loads(run(capsys, "inspect", folder, "--json").out)
    stored, parameters = document["dtypes_by_part"], document["parameters"]
    assert {part: set(dtypes) for part, dtypes in stored.items()} == {
        "embedding": {"BF16"},
        "attention": {"BF16", "F16"},
        "delta_net": {"BF16"},
        "norms": {"BF16"},
        "router": {"F32"},
        "experts": {"BF16", "F32"},
        "shared_experts": {"BF16"},
        "mtp": {"BF16", "F16", "F32"},
    }
    for part, dtypes in stored.items():
        assert sum(dtypes.values()) == parameters[part]
    assert document["dtypes"]["F16"] == stored["attention"]["F16"] + stored["mtp"]["F16"]
    lines = {" ".join(line.split()) for line in run(capsys, "inspect", folder).out.splitlines()}
    assert f"router {parameters['router']:,} F32" in lines


def test_the_state_of_a_sequence_is_one_figure(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    document = json.loads(run(capsys, "inspect", folder, "--json").out)
    from qnext.planning.machine import format_bytes

    figure = format_bytes(document["state_bytes_per_sequence"]["total"])
    assert f"state per sequence {figure}\n" in run(capsys, "inspect", folder).out
    assert f"state {figure} per sequence" in run(capsys, "doctor", folder, "--quick", "--json").out
    assert f"state {figure} per sequence" in run(capsys, "generate", folder, "hi", "--max-tokens", 1).err


def test_text(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    document = json.loads(run(capsys, "inspect", folder, "--json").out)
    result = run(capsys, "inspect", folder)
    assert result.code == 0
    lines = {" ".join(line.split()) for line in result.out.splitlines()}
    parameters = document["parameters"]
    assert f"experts {parameters['experts']:,} BF16" in lines
    assert f"active with head {parameters['active_with_head']:,}" in lines
    assert "model.layers.*.linear_attn.conv1d.weight [512, 1, 4] BF16 3" in lines


def test_only_headers_are_read(tmp_path: Path, capsys: Capture) -> None:
    """Sparse files of a full-size model would take hours to read."""
    from qnext.checkpoint.files import ShardWriter
    from qnext.checkpoint.save import disk_plan, write_config

    config = preset("80b-a3b").with_layers(4)
    import torch

    folder = tmp_path / "m"
    folder.mkdir()
    write_config(folder, config, dtype=torch.bfloat16)
    writer = ShardWriter(folder, disk_plan(config, torch.bfloat16), max_shard_bytes=1 << 60)
    (shard,) = writer._shards
    shard.path.write_bytes(shard.prefix)
    total = sum(spec.num_bytes for spec in disk_plan(config, torch.bfloat16).values())
    os.truncate(shard.path, len(shard.prefix) + total)
    document = json.loads(run(capsys, "inspect", folder, "--json").out)
    assert document["bytes"] == total > 10e9


ERRORS = {
    "nothing there": (lambda f: None, "nowhere", 3, "nowhere: no such folder or preset"),
    "hub name": (lambda f: None, "some-org/some-model", 3, "`qnext pull some-org/some-model` downloads it"),
    "empty name": (lambda f: None, "", 3, "empty name"),
    "no config": (lambda f: (f / "config.json").unlink(), None, 3, "no config.json"),
    "zero experts": (lambda f: _config(f, num_experts=0), None, 5, "num_experts: must be at least 1, not 0"),
    "top-k": (lambda f: _config(f, num_experts_per_tok=9), None, 5, "num_experts_per_tok (9) exceeds num_experts (5)"),
    "not implemented": (lambda f: _config(f, hidden_act="gelu"), None, 6, "hidden_act: 'gelu' is not supported"),
    "experts": (lambda f: _config(f, num_experts=6), None, 5, "experts.5.gate_proj.weight is missing"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), None, 5, "not readable as JSON"),
}


def _config(folder: Path, **changes: object) -> None:
    edit_json(folder / "config.json", lambda values: values.update(changes))


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(tmp_path: Path, capsys: Capture, name: str) -> None:
    damage, argument, code, message = ERRORS[name]
    folder = make_model(tmp_path)
    damage(folder)
    result = run(capsys, "inspect", folder if argument is None else argument, "--json")
    assert result.code == code
    assert result.error_line.startswith("qnext inspect: ")
    assert message in result.error_line
