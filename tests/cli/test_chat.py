"""`qnext chat` through a pipe, on a tiny random model."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qnext.checkpoint import load_model
from qnext.cli import main
from qnext.cli._chat_loop import _terminal_reader
from qnext.cli._conversation import Conversation
from qnext.cli.chat import run_chat
from qnext.engine import Engine, SamplingParams
from qnext.errors import DoesNotFit, UsageError
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.tokenizer import Tokenizer

Captured = pytest.CaptureFixture[str]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


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


@pytest.fixture
def conversation(chat_folder: Path) -> Conversation:
    tokenizer = Tokenizer.from_folder(chat_folder)
    engine = Engine(load_model(chat_folder), max_num_seqs=1)
    return Conversation(engine, tokenizer, ChatFormat.for_folder(chat_folder), PARAMS)


def silent(text: str) -> None:
    """Where answers go that nobody reads."""


def test_each_turn_sees_the_ones_before(conversation: Conversation) -> None:
    conversation.system = "Be brief."
    first = conversation.answer("Hi", silent)
    second = conversation.answer("And?", silent)
    assert conversation.chat_format is not None
    turns = [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", first),
        Message("user", "And?"),
    ]
    prompt_ids = conversation.chat_format.encode(conversation.tokenizer, turns)
    (expected,) = conversation.engine.generate([prompt_ids], PARAMS)
    assert second == conversation.tokenizer.decode(expected.output_ids, skip_special=True)


def test_the_written_pieces_are_the_answer(conversation: Conversation) -> None:
    pieces: list[str] = []
    answer = conversation.answer("Hi", pieces.append)
    assert "".join(pieces) == answer and len(pieces) > 1


def test_regenerate_drops_the_old_answer(conversation: Conversation) -> None:
    with pytest.raises(UsageError, match="nothing"):
        conversation.regenerate(silent)
    conversation.answer("Hi", silent)
    first = conversation.answer("And?", silent)
    assert conversation.regenerate(silent) == first
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2
    conversation.set_parameter("max_tokens", "2")
    assert conversation.regenerate(silent) == conversation.turns[-1].content != first


def test_a_full_context_says_so_and_keeps_the_conversation(conversation: Conversation) -> None:
    conversation.answer("Hi", silent)
    before = list(conversation.turns)
    with pytest.raises(DoesNotFit):
        conversation.answer("x" * 300, silent)
    assert conversation.turns == before
    conversation.clear()
    conversation.params = SamplingParams(max_tokens=200, ignore_eos=True)
    conversation.answer("x" * 150, silent)
    assert not conversation.engine.has_unfinished


def test_ctrl_c_ends_the_answer_only(conversation: Conversation) -> None:
    conversation.params = SamplingParams(max_tokens=100, ignore_eos=True)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    answer = conversation.answer("Hi", write)
    assert signal.getsignal(signal.SIGINT) is handler
    assert conversation.turns[-1].content == answer
    assert 0 < len(conversation.tokenizer.encode(answer)) < 60
    assert not conversation.engine.has_unfinished
    conversation.engine.check_integrity()


def test_save_and_load(conversation: Conversation, tmp_path: Path) -> None:
    conversation.system = "Sei kurz, bitte: ä"
    conversation.answer("Hi", silent)
    conversation.set_parameter("temperature", "0.5")
    conversation.save(tmp_path / "talk.json")
    saved = (list(conversation.turns), conversation.params, conversation.system)
    conversation.clear()
    conversation.system, conversation.params = None, PARAMS
    conversation.load(tmp_path / "talk.json")
    assert (conversation.turns, conversation.params, conversation.system) == saved
    assert conversation.last_input == "Hi"
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{", '{"system": null}', '{"system": 3, "messages": [], "parameters": {}}',
        '{"system": null, "messages": "hello", "parameters": {}}',
        '{"system": null, "messages": [{"role": "user", "content": "a"}], "parameters": {}}',
        '{"system": null, "messages": [], "parameters": {"heat": 3}}',
        '{"system": null, "messages": [], "parameters": {"top_p": 3}}',
        '{"system": null, "messages": [], "parameters": "abc"}',
    ],
)  # fmt: skip
def test_a_damaged_file_changes_nothing(conversation: Conversation, tmp_path: Path, content: str) -> None:
    conversation.answer("Hi", silent)
    before = (list(conversation.turns), conversation.params)
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(UsageError, match=r"talk\.json"):
        conversation.load(tmp_path / "talk.json")
    assert (conversation.turns, conversation.params) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("heat", "1"), ("temperature", "warm"), ("temperature", "true"), ("temperature", ""), ("top_p", "NaN"),
     ("max_tokens", "0"), ("ignore_eos", "1"), ("top_k", "[1]")],
)  # fmt: skip
def test_impossible_parameters_change_nothing(conversation: Conversation, name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        conversation.set_parameter(name, value)
    assert conversation.params == PARAMS


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
    engine = Engine(load_model(plain_folder), max_num_seqs=1)
    (expected,) = engine.generate([tokenizer.encode("Hello")], SamplingParams(max_tokens=4))
    line = tokenizer.decode(expected.output_ids, skip_special=True)
    assert captured.out == (line if line.endswith("\n") else line + "\n") * 2


def test_the_terminal_reader_edits_lines_and_leaves() -> None:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        read = _terminal_reader()
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
    run_chat(model, tokenizer, params=SamplingParams(max_tokens=3), read_line=reader("ab", "/exit", "cd"))
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
    plain_folder: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, arguments: list[str],
    code: int, message: str,
) -> None:  # fmt: skip
    filled = [a.replace("{plain}", str(plain_folder)).replace("{chat}", str(chat_folder)) for a in arguments]
    assert run(monkeypatch, "Hi\n", *filled) == code
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and captured.out == ""


HYBRID = Path(__file__).parents[1] / "text/templates/Qwen-Qwen3-0.6B.jinja"


def test_a_switch_of_the_template_is_a_switch_of_the_chat(chat_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "m"))
    shutil.copyfile(HYBRID, folder / "chat_template.jinja")
    tokenizer = Tokenizer.from_folder(folder)
    engine = Engine(load_model(folder), max_num_seqs=1)
    talk = Conversation(engine, tokenizer, ChatFormat.for_folder(folder), PARAMS)
    turns = [Message("user", "Hi")]
    closed = "<think>\n\n</think>\n\n"
    assert talk.can_think
    for thinks, arguments, ending in (
        (None, {}, "assistant\n"),
        (True, {}, "assistant\n"),
        (False, {}, closed),
        (True, {"enable_thinking": False}, closed),
    ):
        talk.template_arguments = arguments
        if thinks is not None:
            talk.set_thinking(thinks)
        assert tokenizer.decode(talk._prompt_ids("", turns)[0]).endswith(ending)


def test_a_thought_that_the_model_opens_is_no_answer(conversation: Conversation) -> None:
    parser = conversation._parser("possible")
    assert parser is not None, "the vocabulary has the marks"
    events = [*parser.push("<think>\nhm\n</think>\n\nHello"), *parser.finish()]
    assert [(type(event).__name__, event.text) for event in events] == [("Reasoning", "hm"), ("Content", "Hello")]
    assert conversation.answer("Hi", silent) and conversation.turns[-1].reasoning_content is None


def test_no_think_for_a_model_without_thoughts_is_told(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run(monkeypatch, "Hi\n", chat_folder, "--no-think") == 2
    assert "has no thoughts" in capsys.readouterr().err
    assert run(monkeypatch, "Hi\n", chat_folder, "--complete", "--no-think") == 2
