"""`qnext verify`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .command import Capture, edit_json, make_model, poke, run

NAN = b"\xc0\x7f"  # bfloat16
INDEX = "model.safetensors.index.json"


def test_sound_model(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    assert run(capsys, "verify", folder) == (0, f"{folder}: ok\n", "")
    assert json.loads(run(capsys, "verify", folder, "--json").out) == {"model": str(folder), "ok": True, "problems": []}


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 1)


def _point_outside(folder: Path) -> None:
    def change(index: dict[str, dict[str, str]]) -> None:
        index["weight_map"]["model.norm.weight"] = "../x.safetensors"

    edit_json(folder / INDEX, change)


def _duplicate(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    line = next(line for line in text.splitlines() if "model.norm.weight" in line)
    (folder / INDEX).write_text(text.replace(line, line.rstrip(",") + ",\n" + line))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda f: poke(f, "model.layers.1.mlp.gate.weight", NAN), "model.layers.1.mlp.gate.weight holds NaN"),
    "truncated": (_truncate, "truncated inside tensor"),
    "outside": (_point_outside, "'../x.safetensors' is not the name of a file in the folder"),
    "duplicate": (_duplicate, "key 'model.norm.weight' appears twice"),
    "zero experts": (
        lambda f: edit_json(f / "config.json", lambda v: v.update(num_experts=0)), "num_experts: must be at least 1"
    ),
    "top-k": (
        lambda f: edit_json(f / "config.json", lambda v: v.update(num_experts_per_tok=6)), "exceeds num_experts"
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "end token": (
        lambda f: edit_json(f / "generation_config.json", lambda v: v.update(eos_token_id=[300])),
        "end token 300 is outside the vocabulary of 300",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line(tmp_path: Path, capsys: Capture, name: str) -> None:
    folder = make_model(tmp_path)
    damage, message = DAMAGES[name]
    damage(folder)
    result = run(capsys, "verify", folder)
    assert result.code == 5
    assert message in result.error_line
    document = run(capsys, "verify", folder, "--json")
    problems = json.loads(document.out)["problems"]
    assert (document.code, document.err, len(problems)) == (5, "", 1)
    assert message in problems[0]


def test_vocabulary_smaller_than_the_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    from dataclasses import replace

    from qnext.checkpoint import create_folder

    from .command import CONFIG

    make_model(tmp_path)
    create_folder(replace(CONFIG, vocab_size=270), tmp_path / "m", seed=0, tokenizer_folder=tmp_path / "made-tokenizer")
    result = run(capsys, "verify", tmp_path / "m")
    assert result.code == 5
    assert "tokenizer.json has 271 tokens, the model 270" in result.error_line


def test_all_problems_are_listed(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    names = ["model.embed_tokens.weight", "model.layers.1.linear_attn.A_log", "mtp.fc.weight"]
    for name in names:
        poke(folder, name, NAN)
    (folder / "tokenizer.json").unlink()
    result = run(capsys, "verify", folder, "--json")
    problems = json.loads(result.out)["problems"]
    assert result.code == 5
    assert len(problems) == 4
    assert all(any(name in problem for problem in problems) for name in names)
    lines = run(capsys, "verify", folder).err.splitlines()
    assert lines == [f"qnext verify: {problem}" for problem in problems]


def test_nothing_to_verify(tmp_path: Path, capsys: Capture) -> None:
    result = run(capsys, "verify", "80b-a3b")
    assert result.code == 3
    assert "is a preset and has no weights" in result.error_line
    result = run(capsys, "verify", tmp_path)
    assert result.code == 3
    assert "neither model.safetensors nor" in result.error_line
