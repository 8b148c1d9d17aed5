"""`qnext generate` as a user calls it, on a tiny random model."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qnext.checkpoint import load_model
from qnext.cli import main
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt
from qnext.text.tokenizer import Tokenizer

Captured = pytest.CaptureFixture[str]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", *map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def document(capsys: Captured, *arguments: str | Path) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def greedy(folder: Path, prompt_ids: list[int], max_tokens: int) -> list[int]:
    (done,) = Engine.of(load_model(folder), EngineConfig(max_num_seqs=1)).generate(
        [prompt_ids], SamplingParams(max_tokens=max_tokens)
    )
    return list(done.output_ids)


def test_text_is_the_models_completion(plain_folder: Path, capsys: Captured) -> None:
    tokenizer = Tokenizer.from_folder(plain_folder)
    expected = greedy(plain_folder, tokenizer.encode("Hello"), 20)
    assert run(plain_folder, "Hello", "--max-tokens", "20") == 0
    captured = capsys.readouterr()
    text = tokenizer.decode(expected, skip_special=True)
    assert captured.out == text + ("" if text.endswith("\n") else "\n")
    assert "KV" in captured.err and "tokens/s" in captured.err


def test_yarn_stretches_the_context(plain_folder: Path, capsys: Captured) -> None:
    assert run(plain_folder, "a" * 300, "--max-tokens", "2") == 4
    result = document(capsys, plain_folder, "a" * 300, "--max-tokens", "2", "--ignore-eos", "--yarn", "4")
    assert len(result["token_ids"]) == 2
    assert run(plain_folder, "a", "--yarn", "0.5") == 2


def test_speculation_changes_no_answer_and_needs_its_layer(
    plain_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run(plain_folder, "a", "--speculation") == 2
    assert "no layer for multi-token prediction" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["init", "nano-5m", str(tmp_path / "model")])
    capsys.readouterr()
    answers = [
        document(capsys, tmp_path / "model", "a", "--special", "--max-tokens", "40", "--ignore-eos", flag)["token_ids"]
        for flag in ("--speculation", "--no-speculation")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 40


def test_json_document(plain_folder: Path, capsys: Captured) -> None:
    tokenizer = Tokenizer.from_folder(plain_folder)
    result = document(capsys, plain_folder, "Hello", "--max-tokens", "6", "--logprobs", "2")
    assert result["token_ids"] == greedy(plain_folder, tokenizer.encode("Hello"), 6)
    assert result["usage"] == {"prompt_tokens": 5, "completion_tokens": 6}
    assert result["finish_reason"] == "length"
    assert result["text"] == tokenizer.decode(result["token_ids"], skip_special=True)
    assert result["timings"]["prefill_seconds"] > 0 and result["timings"]["decode_tokens_per_second"] > 0
    for token_id, entry in zip(result["token_ids"], result["logprobs"], strict=True):
        assert entry["token_id"] == entry["top"][0]["token_id"] == token_id
        assert entry["logprob"] == entry["top"][0]["logprob"] > entry["top"][1]["logprob"]


def test_seed_repeats_and_temperature_matters(plain_folder: Path, capsys: Captured) -> None:
    arguments = (plain_folder, "Hello", "--max-tokens", "12", "--temperature", "1.5")
    first = document(capsys, *arguments, "--seed", "1")["token_ids"]
    assert document(capsys, *arguments, "--seed", "1")["token_ids"] == first
    assert document(capsys, *arguments, "--seed", "2")["token_ids"] != first
    drawn = document(capsys, *arguments)
    again = document(capsys, *arguments, "--seed", str(drawn["seed"]))
    assert drawn["token_ids"] == again["token_ids"] != first


def test_defaults_of_the_folder_and_flags_above_them(chat_folder: Path, capsys: Captured) -> None:
    arguments = (chat_folder, "Hello", "--max-tokens", "12", "--seed", "5", "--ignore-eos")
    from_folder = document(capsys, *arguments)["token_ids"]
    explicit = document(capsys, *arguments, "--temperature", "1.4", "--top-k", "50")["token_ids"]
    assert from_folder == explicit
    assert document(capsys, *arguments, "--temperature", "0")["token_ids"] != from_folder


def test_a_stop_text_ends_the_answer_before_it(plain_folder: Path, capsys: Captured) -> None:
    whole = document(capsys, plain_folder, "Hello", "--max-tokens", "20")
    stop = whole["text"][5:7]
    result = document(capsys, plain_folder, "Hello", "--max-tokens", "20", "--stop", stop, "--stop", "never there")
    assert result["text"] == whole["text"][: whole["text"].index(stop)]
    assert result["finish_reason"] == "stop"
    assert len(result["token_ids"]) < 20


def test_chat_renders_the_folders_format(chat_folder: Path, capsys: Captured) -> None:
    tokenizer = Tokenizer.from_folder(chat_folder)
    chat_format = ChatFormat.for_folder(chat_folder)
    prompt_ids = ChatPrompt([Message("user", "Hi")]).encode(chat_format, tokenizer).token_ids
    result = document(capsys, chat_folder, "Hi", "--chat", "--temperature", "0", "--max-tokens", "5")
    assert result["usage"]["prompt_tokens"] == len(prompt_ids)
    assert result["token_ids"] == greedy(chat_folder, prompt_ids, 5)


def test_control_tokens_are_tokens_unless_told_otherwise(plain_folder: Path, capsys: Captured) -> None:
    arguments = (plain_folder, "a<|im_start|>", "--max-tokens", "1")
    assert document(capsys, *arguments)["usage"]["prompt_tokens"] == 2
    assert document(capsys, *arguments, "--special")["usage"]["prompt_tokens"] == 2
    assert document(capsys, *arguments, "--no-special")["usage"]["prompt_tokens"] == 13


HYBRID = Path(__file__).parents[1] / "text/templates/Qwen-Qwen3-0.6B.jinja"


@pytest.mark.parametrize(
    ("flags", "closes"),
    [
        ([], False),
        (["--think"], False),
        (["--no-think"], True),
        (["--chat-template-kwargs", '{"enable_thinking": false}'], True),
        (["--chat-template-kwargs", '{"enable_thinking": true}', "--no-think"], False),
    ],
)
def test_flags_reach_the_chat_template(
    chat_folder: Path, tmp_path: Path, capsys: Captured, flags: list[str], closes: bool
) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "m"))
    shutil.copyfile(HYBRID, folder / "chat_template.jinja")
    found = document(capsys, folder, "Hi", "--chat", "--max-tokens", "1", *flags)["usage"]["prompt_tokens"]
    tokenizer = Tokenizer.from_folder(folder)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * closes
    assert found == len(tokenizer.encode(text, allow_special=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-think"], "belong to --chat"),
        (["--chat", "--chat-template-kwargs", "[1]"], "must be a"),
        (["--chat", "--chat-template-kwargs", "{"], "must be a"),
        (["--chat", "--chat-template-kwargs", '{"x": 1}'], "reads no argument 'x'"),
        (["--chat", "--chat-template-kwargs", '{"enable_thinking": "no"}'], "must be true or false"),
    ],
)
def test_flags_that_say_nothing_to_the_template(
    chat_folder: Path, capsys: Captured, flags: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", str(chat_folder), "Hi", *flags])
    assert exit_.value.code == 2 and words in capsys.readouterr().err


def test_prompt_from_standard_input(plain_folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    from_input = document(capsys, plain_folder, "-", "--max-tokens", "4")
    assert from_input["token_ids"] == document(capsys, plain_folder, "Hello", "--max-tokens", "4")["token_ids"]


def test_without_max_tokens_the_context_is_the_limit(plain_folder: Path, capsys: Captured) -> None:
    result = document(capsys, plain_folder, "x" * 250, "--ignore-eos")
    assert result["usage"]["completion_tokens"] == 6 and result["finish_reason"] == "length"


def test_bfloat16_runs(plain_folder: Path, capsys: Captured) -> None:
    result = document(capsys, plain_folder, "Hello", "--max-tokens", "3", "--dtype", "bfloat16", "--ignore-eos")
    assert len(result["token_ids"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing-folder", "Hi"], 3, "missing-folder"),
        (["{folder}", ""], 2, "empty"),
        (["{folder}", "x" * 300], 4, "at most 255 tokens would fit"),
        (["{folder}", "Hi", "--max-tokens", "255"], 4, "max_tokens 254 would fit"),
        (["{folder}", "Hi", "--max-tokens", "0"], 2, "max_tokens"),
        (["{folder}", "Hi", "--temperature", "nan"], 2, "temperature"),
        (["{folder}", "Hi", "--top-p", "0"], 2, "top_p"),
        (["{folder}", "Hi", "--stop", ""], 2, "stop string"),
        (["{folder}", "Hi", "--dtype", "int3"], 2, "dtype"),
        (["{folder}", "Hi", "--logprobs", "1"], 2, "--json"),
        (["{folder}", "Hi", "--chat"], 2, "no chat template"),
    ],
)
def test_a_users_fault_is_one_line(
    plain_folder: Path, capsys: Captured, arguments: list[str], code: int, message: str
) -> None:
    assert run(*(a.replace("{folder}", str(plain_folder)) for a in arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_a_bad_default_of_the_folder_names_its_file(plain_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = Path(shutil.copytree(plain_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    assert run(folder, "Hi") == 5
    assert "generation_config.json: temperature must be a number" in capsys.readouterr().err
