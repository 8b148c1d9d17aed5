"""`qnext chat` through a pipe, on a tiny random model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qnext.checkpoint import load_model
from qnext.cli import main
from qnext.cli.terminal.chat_loop import converse, terminal_reader
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.session.conversation import open_conversation
from qnext.text.tokenizer import Tokenizer

Captured = pytest.CaptureFixture[str]


def run(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(SystemExit) as exit_:
        main(["chat", *map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def reader(*lines: str) -> Callable[[str], str]:
    source: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    return read


def silent(text: str) -> None:
    """Where answers go that nobody reads."""


def test_commands_through_a_pipe(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    path = tmp_path / "talk.json"
    script = f'''/?
/set system You are short.
/set parameter temperature 0
/set parameter heat 3
Hi there
"""two
lines"""
/multi
three
more
lines
"""
/save {path}
/save
/nonsense
/load {tmp_path / "none.json"}
/show
/bye
never read
'''
    assert run(monkeypatch, script, chat_folder, "--max-tokens", "3") == 0
    captured = capsys.readouterr()
    saved = json.loads(path.read_text())
    assert saved["system"] == "You are short."
    assert [turn["content"] for turn in saved["messages"][::2]] == ["Hi there", "two\nlines", "three\nmore\nlines"]
    answers = [turn["content"] for turn in saved["messages"][1::2]]
    assert captured.out == "".join(text if text.endswith("\n") else text + "\n" for text in answers)
    for part in ("/regenerate", "no parameter 'heat'", "/save needs a file", "no command /nonsense", "none.json"):
        assert part in captured.err
    assert "6 turns" in captured.err and "Traceback" not in captured.err


def test_a_folder_without_chat_format_completes(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run(monkeypatch, "Hello\n/set system no\n/clear\nHello", plain_folder, "--max-tokens", "4") == 0
    captured = capsys.readouterr()
    assert "completed as plain text" in captured.err and "needs a chat format" in captured.err
    tokenizer = Tokenizer.from_folder(plain_folder)
    engine = Engine.of(load_model(plain_folder), EngineConfig(max_num_seqs=1))
    (expected,) = engine.generate([tokenizer.encode("Hello")], SamplingParams(max_tokens=4))
    line = tokenizer.decode(expected.output_ids, skip_special=True)
    assert captured.out == (line if line.endswith("\n") else line + "\n") * 2


def test_the_terminal_reader_edits_lines_and_leaves() -> None:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        read = terminal_reader()
        pipe.send_text("Hellp\x7fo\r")
        assert read(">>> ") == "Hello"
        pipe.send_text("\x04")
        with pytest.raises(EOFError):
            read(">>> ")
        pipe.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read(">>> ")


def test_a_model_in_memory(plain_folder: Path, capsys: Captured) -> None:
    model, tokenizer = load_model(plain_folder), Tokenizer.from_folder(plain_folder)
    converse(open_conversation(model, tokenizer, SamplingParams(max_tokens=3)), reader("ab", "/exit", "cd"))
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing-folder"], 3, "missing-folder"),
        (["{plain}", "--system", "x"], 2, "chat format"),
        (["{chat}", "--context", "999"], 2, "256"),
        (["{chat}", "--top-k", "-5"], 2, "top_k"),
    ],
)
def test_a_users_fault_has_its_exit_code(
    plain_folder: Path,
    chat_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    filled = [a.replace("{plain}", str(plain_folder)).replace("{chat}", str(chat_folder)) for a in arguments]
    assert run(monkeypatch, "Hi\n", *filled) == code
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and captured.out == ""


def test_no_think_for_a_model_without_thoughts_is_told(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run(monkeypatch, "Hi\n", chat_folder, "--no-think") == 2
    assert "has no thoughts" in capsys.readouterr().err
    assert run(monkeypatch, "Hi\n", chat_folder, "--complete", "--no-think") == 2
