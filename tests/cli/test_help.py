"""Help at any width, help for a word, MODEL by a flag, and mistakes of a command line as one line that helps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.cli import VERBS, click_command
from qnext.cli.parsing.complete import candidates

from .command import Capture, run

ROOT = Path(__file__).parents[2]
WITH_MODEL = (
    "inspect",
    "verify",
    "logits",
    "generate",
    "serve",
    "eval",
    "quantize",
    "bench",
    "convert",
    "experts",
    "doctor",
)


def flags_of(verb: str) -> list[str]:
    return [flag for parameter in click_command(verb).params for flag in parameter.opts if flag.startswith("-")]


@pytest.mark.parametrize("columns", [30, 60, 80, 100, 200])
@pytest.mark.parametrize("verb", VERBS)
def test_no_name_is_cut_at_any_width(capsys: Capture, monkeypatch: pytest.MonkeyPatch, verb: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run(capsys, verb, "-h")
    assert (result.code, result.err) == (0, "")
    words = set(re.findall(r"[\w-]+", result.out))
    assert set(flags_of(verb)) <= words
    assert "\u2026" not in result.out and "\x1b" not in result.out
    longest = max(result.out.splitlines(), key=len)
    assert len(longest) <= max(columns, max(map(len, longest.split())) + 12), longest
    assert result.out == run(capsys, verb, "--help").out == run(capsys, "help", verb).out


def test_no_number_has_digits_that_nobody_wants(capsys: Capture) -> None:
    for verb in VERBS:
        assert not re.search(r"\d\.\d{3}", run(capsys, verb, "--help").out), verb


def test_a_pipe_gets_plain_text() -> None:
    done = subprocess.run([sys.executable, "-m", "qnext", "serve", "-h"], cwd=ROOT, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout and b"--enable-auto-tool-choice" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_the_help_finds_something(capsys: Capture, verb: str) -> None:
    if verb in ("keys", "watermark"):
        verb_words, text = [verb, "create"], run(capsys, verb, "create", "-h").out
    else:
        verb_words, text = [verb], run(capsys, verb, "-h").out
    (shown,) = set(re.findall(r"--help=[\w-]+", " ".join(text.split())))
    result = run(capsys, *verb_words, shown)
    assert result.out.strip() and result.err == ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["serve", "--help=memory"], "--max-num-seqs"),  # by the title of its section
        (["serve", "--help=tool-call"], "--tool-call-parser"),
        (["serve", "--help=tool_call"], "--tool-call-parser"),
        (["serve", "--help=Max Seqs"], "--max-num-seqs"),
        (["serve", "--help=WORD"], "--host"),
        (["keys", "--help=scope"], "--scope"),
        (["--help=gptq"], "qnext quantize:"),
        (["generate", "--help=config"], "--config FILE"),
        (["generate", "--help=model"], "-m, --model"),
    ],
)
def test_words_that_find_something(capsys: Capture, arguments: list[str], found: str) -> None:
    result = run(capsys, *arguments)
    assert (result.code, result.err) == (0, "")
    assert found in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sevre"], "no verb 'sevre'; did you mean serve?"),
        (["Generate"], "did you mean generate?"),
        (["quantise", "m"], "did you mean quantize?"),
        (["download", "m"], "did you mean pull?"),
        (["run", "m"], "did you mean chat?"),
        (["walrus"], "`qnext --help` lists them"),
        (["serve", "m", "--prot", "1"], "qnext serve: no option --prot; did you mean --port?"),
        (["generate", "m", "p", "--max_tokens", "1"], "no option --max_tokens; did you mean --max-tokens?"),
        (["serve", "m", "--served-model", "x"], "did you mean --served-model-name?"),
        (["chat", "m", "--walrus-of-the-sea"], "`qnext chat -h` lists the options"),
        (["keys", "create", "--nmae", "x"], "qnext keys create: no option --nmae; did you mean --name?"),
        (["keys", "craete"], "did you mean 'create'"),
        (["serve"], "qnext serve: MODEL is missing; usage: qnext serve MODEL [OPTIONS]"),
        (["generate"], "qnext generate: MODEL is missing; usage: qnext generate MODEL PROMPT"),
        (["generate", "-m", "m"], "qnext generate: PROMPT is missing"),
        (["chat"], "give either MODEL or --url"),
        (["keys", "create"], "--name is missing"),
        (["serve", "m", "--port", "x"], "qnext serve: --port: must be a valid integer"),
        (["serve", "m", "--port"], "'--port' requires an argument"),
        (["generate", "m", "two", "words"], "a value with spaces needs quotes"),
        (["serve", "-m", "a", "--model", "b"], "takes one model"),
        (["serve", "-m"], "takes one model"),
        (["train", "smal-code"], "did you mean small-code?"),
        (["train", "small-code", "--set", "time_budgt=3"], "did you mean time_budget?"),
        (["train", "small-code", "--set", "model.num_expert=3"], "did you mean num_experts?"),
        (["quantize", "m", "o", "--scheme", "int4_g32"], "did you mean int4-g32?"),
        (["init", "micro-20", "{tmp}/o"], "did you mean micro-20m?"),
    ],
)
def test_a_mistake_is_one_line_that_helps(capsys: Capture, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(capsys, *(word.replace("{tmp}", str(tmp_path)) for word in arguments))
    assert result.code in (2, 3)
    assert message in result.error_line.replace("Did", "did")


@pytest.mark.parametrize("flag", ["-m", "--model", "--model-path"])
@pytest.mark.parametrize("verb", WITH_MODEL)
def test_the_model_by_a_flag(verb: str, flag: str) -> None:
    command = click_command(verb)
    rest = {
        "logits": ["--tokens", "1", "--out", "o"],
        "generate": ["a -m b"],
        "eval": ["f"],
        "convert": ["o.gguf"],
        "quantize": ["o", "--scheme", "int8"],
        "experts": ["text"],
    }.get(verb, [])
    by_place = command.make_context("x", ["MODEL", *rest]).params
    for words in ([flag, "MODEL", *rest], [*rest, flag, "MODEL"], [*rest, f"{flag}=MODEL"]):
        assert click_command(verb).make_context("x", words).params == by_place


def test_a_value_or_a_text_that_looks_like_the_flag() -> None:
    command = click_command("generate")
    assert command.make_context("x", ["M", "p", "--stop", "-m"]).params["stop"] == ["-m"]
    assert command.make_context("x", ["-m", "M", "--", "-m"]).params["prompt"] == "-m"
    assert command.make_context("x", ["-m", "M", "--", "-m"]).params["model"] == "M"


def test_a_verb_with_such_a_flag_of_its_own_keeps_it(capsys: Capture) -> None:
    assert click_command("keys").commands["create"].make_context("x", ["--name", "n", "--model", "a"]).params["model"]
    assert click_command("bench-serve").make_context("x", ["--model", "a"]).params["model"] == "a"
    assert "nowhere/at-all: no such folder" in run(capsys, "chat", "-m", "nowhere/at-all").error_line
    assert "belong to --url" in run(capsys, "chat", "folder", "-m", "name").error_line


def test_the_flag_is_completed() -> None:
    assert {"-m\tMODEL by a flag", "-h\t"} <= set(candidates(["serve", "-"]))
    assert candidates(["serve", "-m", ""])[-1] == "#folders"
    assert "nano-5m\tpreset" in candidates(["inspect", "--model", "nano"])
    assert candidates(["generate", "-m", "x", "--se"]) == ["--seed\tMakes sampling repeatable."]
