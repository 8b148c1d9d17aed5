"""Flags from a file and from the environment, the order in which they count, and the search in the help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qnext.cli import VERBS, click_command
from qnext.cli.flags.values import human_int
from qnext.cli.parsing.config_file import read_flags, take_config
from qnext.errors import UsageError
from qnext.text.mappings import MAX_FILE_BYTES

from .command import Capture, run


def written(tmp_path: Path, text: str, name: str = "flags.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def flags(path: Path, verb: str = "generate") -> dict[str, Any]:
    return read_flags(path, verb, click_command(verb), VERBS)


def num_tokens(capsys: Capture, folder: Path, *more: object) -> int:
    result = run(capsys, "generate", folder, "ab", "--json", "--ignore-eos", *more)
    assert result.code == 0, result.err
    count = json.loads(result.out)["usage"]["completion_tokens"]
    assert isinstance(count, int)
    return count


def test_command_line_then_file_then_environment(
    plain_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "max_tokens: 3\n")
    monkeypatch.setenv("QNEXT_GENERATE_MAX_TOKENS", "2")
    assert num_tokens(capsys, plain_folder) == 2
    assert num_tokens(capsys, plain_folder, "--config", path) == 3
    assert num_tokens(capsys, plain_folder, f"--config={path}", "--max-tokens", "4") == 4
    monkeypatch.setenv("QNEXT_GENERATE_CONFIG", str(path))
    assert num_tokens(capsys, plain_folder) == 3


def test_the_variable_is_named_like_the_flag(
    plain_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--json, not as_json, the name of the parameter behind it."""
    monkeypatch.setenv("QNEXT_GENERATE_JSON", "1")
    monkeypatch.setenv("QNEXT_GENERATE_AS_JSON", "nonsense")
    result = run(capsys, "generate", plain_folder, "ab", "--max-tokens", "1")
    assert json.loads(result.out)["usage"]["completion_tokens"] == 1


def test_a_whole_command_from_a_file(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    values = {"MODEL": str(plain_folder), "prompt": "ab", "--json": True, "max-tokens": 2, "stop": ["x", 7]}
    path = written(tmp_path, json.dumps({"generate": values, "chat": {"unread": 1}}), "flags.json")
    result = run(capsys, "generate", "--config", path)
    assert (result.code, json.loads(result.out)["usage"]["completion_tokens"]) == (0, 2)


def test_kinds_of_values(tmp_path: Path) -> None:
    path = written(tmp_path, "stop: [a, 1]\nignore-eos: true\ntemperature: 1e-3\nno_speculation: true\nseed:\n")
    assert flags(path) == {"stop": ["a", "1"], "ignore_eos": True, "temperature": "1e-3", "speculation": False}
    assert flags(written(tmp_path, "stop: one\n")) == {"stop": ["one"]}
    assert flags(written(tmp_path, "# nothing\n")) == {}
    assert flags(written(tmp_path, "dtype: {a: [1]}\n")) == {"dtype": '{"a": [1]}'}


WRONG = {
    "max_tokns: 3": "max_tokns: qnext generate has no such flag; the nearest is --max-tokens",
    "generate: {sed: 3}": "flags.yaml: generate: sed: qnext generate has no such flag; the nearest is --seed",
    "max_tokens: 3\nmax-tokens: 4": "max-tokens: the same flag stands there twice",
    "max_tokens: 3\nmax_tokens: 4": "max_tokens: stands there twice",
    "chat: {seed: 3}": "has flags for chat, none for generate",
    "generate: {seed: 3}\nseed: 4": "seed: is no verb, but generate is",
    "ignore-eos: yes please": "ignore-eos: is a switch, true or false, not 'yes please'",
    "dtype: no": "dtype: takes a value",
    "seed: [1, 2]": "seed: takes one value, not a list",
    "- seed": "must be a mapping of flags to values, not list",
    "a: [": "cannot be read: while parsing",
    "a: !!python/object/apply:os.getcwd []": "cannot be read: could not determine a constructor",
    "a: " + "[" * 1000: "cannot be read",
    "#" * (MAX_FILE_BYTES + 1): "more than 1,048,576 bytes",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: Capture, text: str) -> None:
    path = written(tmp_path, text)
    result = run(capsys, "generate", "model", "prompt", "--config", path)
    assert result.code == 2
    assert result.error_line.startswith(f"qnext generate: {path}: ")
    assert WRONG[text] in result.error_line


def test_json_has_no_key_twice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed: stands there twice"):
        flags(written(tmp_path, '{"seed": 1, "seed": 2}', "flags.json"))


def test_files_that_cannot_be_read(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"stop: \xe9")
    for name, message in (("none.yaml", "No such file"), (".", "Is a directory"), ("latin.yaml", "is not UTF-8 text")):
        result = run(capsys, "generate", "model", "prompt", "--config", tmp_path / name)
        assert (result.code, message in result.error_line) == (2, True), result.err


def test_a_wrong_value_names_its_source(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "seed: x\njson: true\n")
    result = run(capsys, "generate", "model", "prompt", "--config", path)
    assert result.code == 2
    assert "--seed" in result.err
    assert result.err.splitlines()[-1] == f"qnext generate: {path} has given --seed, --json"
    monkeypatch.setenv("QNEXT_GENERATE_SEED", "x")
    assert "QNEXT_GENERATE_SEED" in run(capsys, "generate", "model", "prompt").err


def test_what_belongs_to_the_flag() -> None:
    assert take_config("chat", ["m", "--config", "f", "--seed", "1"]) == (["m", "--seed", "1"], Path("f"))
    assert take_config("chat", ["m", "--", "--config", "f"]) == (["m", "--", "--config", "f"], None)
    for arguments, message in (
        (["--config"], "needs a file"),
        (["--config="], "needs a file"),
        (["--config", "a", "--config=b"], "only one"),
    ):
        with pytest.raises(UsageError, match=message):
            take_config("chat", arguments)


def test_help_shows_no_variable_that_is_not_set(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "QNEXT_GENERATE_SEED" not in run(capsys, "generate", "--help").out
    monkeypatch.setenv("QNEXT_GENERATE_SEED", "3")
    assert "QNEXT_GENERATE_SEED" in run(capsys, "generate", "--help=seed").out


def test_help_finds_a_word(capsys: Capture) -> None:
    result = run(capsys, "chat", "--help=YARN")
    assert (result.code, result.err) == (0, "")
    assert "--yarn FACTOR" in result.out
    assert "--seed" not in result.out
    result = run(capsys, "chat", "--help=walrus")
    assert (result.code, result.out) == (0, "")
    assert "no option mentions 'walrus'" in result.err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4_096", 4096),
        ("32k", 32_000),
        ("32K", 32_768),
        ("25.6k", 25_600),
        ("1.5M", 1_572_864),
        ("2g", 2 * 10**9),
        ("1.1T", None),
        ("9007199254740993", 9007199254740993),
        ("1.5", None),
        ("-1", None),
        ("k", None),
        ("1kk", None),
        ("1e3", None),
        ("\u0663", None),
        ("9" * 50, None),
    ],
)
def test_human_integers(text: str, value: int | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="no whole number"):
            human_int(text)
    else:
        assert human_int(text) == value


def test_chat_takes_a_human_context(tmp_path: Path, capsys: Capture) -> None:
    result = run(capsys, "chat", tmp_path, "--context", "32kb")
    assert (result.code, "'32kb' is no whole" in result.err) == (2, True)
    command = click_command("chat")
    assert command.make_context("chat", ["m", "--context", "32K"]).params["context"] == 32_768
