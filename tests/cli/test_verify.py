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
    expected = {"model": str(folder), "ok": True, "problems": [], "warnings": [], "has_provenance": False}
    assert json.loads(run(capsys, "verify", folder, "--json").out) == expected


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
        lambda f: edit_json(f / "config.json", lambda v: v.update(num_experts=0)),
        "num_experts: must be at least 1",
    ),
    "top-k": (lambda f: edit_json(f / "config.json", lambda v: v.update(num_experts_per_tok=6)), "exceeds num_experts"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "end token": (
        lambda f: edit_json(f / "generation_config.json", lambda v: v.update(eos_token_id=[300])),
        "end token 300 is outside the vocabulary of 300",
    ),
}


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
    assert "is an empty folder" in result.error_line


def _config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda values: values.update(changes))


WARNED: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "unknown keys": (_config(soft_cap=3, magic=1), "unknown keys soft_cap, magic", 5),
    "no drafts": (_config(num_nextn_predict_layers=0), "(mtp.*) are not used", 5),
    "drafts of another kind": (_config(num_nextn_predict_layers=2), "only one layer of Qwen3-Next drafts", 6),
    "dropout": (_config(attention_dropout=0.1), "is for training", 5),
    "no index": (lambda folder: (folder / INDEX).unlink(), "taken as the model", 5),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_passed_over_is_listed_apart(tmp_path: Path, capsys: Capture, name: str) -> None:
    folder = make_model(tmp_path)
    change, words, code = WARNED[name]
    change(folder)
    result = run(capsys, "verify", folder)
    assert (result.code, result.out) == (0, f"{folder}: ok\n")
    lines = result.err.splitlines()
    assert all(line.startswith("qnext verify: warning: ") for line in lines)
    assert sum(words in line for line in lines) == 1
    document = json.loads(run(capsys, "verify", folder, "--json").out)
    assert (document["ok"], document["problems"], len(document["warnings"])) == (True, [], len(lines))
    strict = run(capsys, "verify", folder, "--strict", "--json")
    document = json.loads(strict.out)
    assert (document["ok"], document["warnings"], len(document["problems"])) == (False, [], len(lines))
    assert strict.code == (code if len(lines) == 1 else 5)


@pytest.mark.parametrize("verb", ["inspect", "logits", "generate"])
def test_strict_makes_warnings_errors_of_every_verb(tmp_path: Path, capsys: Capture, verb: str) -> None:
    folder = make_model(tmp_path)
    edit_json(folder / "config.json", lambda values: values.update(soft_cap=3))
    arguments = {"inspect": [], "logits": ["--tokens", "1,2", "--out", tmp_path / "l.npy"], "generate": ["hello"]}[verb]
    result = run(capsys, verb, folder, *arguments, "--strict")
    assert result.code == 5
    assert result.error_line.endswith("config.json: unknown key soft_cap, ignored")
    relaxed = run(capsys, verb, folder, *arguments)
    assert relaxed.code == 0
    assert relaxed.err.count("warning: ") == 1


def test_every_verb_that_loads_a_model_can_be_strict() -> None:
    from qnext.cli import VERBS, click_command

    loading = set()
    for verb in VERBS.keys() - {"pull"}:
        parameters = getattr(click_command(verb), "params", [])
        arguments = [each for each in parameters if each.param_type_name == "argument"]
        if any(str(each.metavar).startswith("MODEL") for each in arguments):
            loading.add(verb)
            assert "--strict" in {option for each in parameters for option in each.opts}, verb
    assert loading >= {"verify", "inspect", "generate", "serve", "chat", "convert", "quantize", "bench", "logits"}


def test_a_form_that_is_not_supported_is_no_damage(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    edit_json(folder / "config.json", lambda values: values.update(model_type="qwen3_5_moe_text", architectures=None))
    for verb in ("verify", "inspect"):
        result = run(capsys, verb, folder)
        assert result.code == 6
        assert "model_type: 'qwen3_5_moe_text' is not supported; supported are qwen3_next" in result.error_line
    assert run(capsys, "doctor", folder, "--quick", "--json").code == 6
    document = json.loads(run(capsys, "verify", folder, "--json").out)
    assert (document["ok"], len(document["problems"])) == (False, 1)


def test_damage_beside_what_is_not_supported_is_damage() -> None:
    from qnext.diagnostics.folder import FolderExamination
    from qnext.errors import ConfigError, CorruptCheckpoint, NotSupported

    codes = [
        FolderExamination([kind("x") for kind in kinds], []).exit_code
        for kinds in (
            [],
            [NotSupported],
            [NotSupported, NotSupported],
            [CorruptCheckpoint, NotSupported],
            [ConfigError],
        )
    ]
    assert codes == [0, 6, 6, 5, 5]
