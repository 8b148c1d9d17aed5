"""A conversation with an engine of this process: turns, thoughts, files, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from qnext.checkpoint import load_model
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.errors import DoesNotFit, UsageError
from qnext.session.conversation import Conversation
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt
from qnext.text.tokenizer import Tokenizer

HYBRID = Path(__file__).parents[1] / "text/templates/Qwen-Qwen3-0.6B.jinja"
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def conversation(chat_folder: Path) -> Conversation:
    tokenizer = Tokenizer.from_folder(chat_folder)
    engine = Engine.of(load_model(chat_folder), EngineConfig(max_num_seqs=1))
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
    prompt_ids = ChatPrompt(turns).encode(conversation.chat_format, conversation.tokenizer).token_ids
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
        "",
        "[]",
        "{",
        '{"system": null}',
        '{"system": 3, "messages": [], "parameters": {}}',
        '{"system": null, "messages": "hello", "parameters": {}}',
        '{"system": null, "messages": [{"role": "user", "content": "a"}], "parameters": {}}',
        '{"system": null, "messages": [], "parameters": {"heat": 3}}',
        '{"system": null, "messages": [], "parameters": {"top_p": 3}}',
        '{"system": null, "messages": [], "parameters": "abc"}',
    ],
)
def test_a_damaged_file_changes_nothing(conversation: Conversation, tmp_path: Path, content: str) -> None:
    conversation.answer("Hi", silent)
    before = (list(conversation.turns), conversation.params)
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(UsageError, match=r"talk\.json"):
        conversation.load(tmp_path / "talk.json")
    assert (conversation.turns, conversation.params) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heat", "1"),
        ("temperature", "warm"),
        ("temperature", "true"),
        ("temperature", ""),
        ("top_p", "NaN"),
        ("max_tokens", "0"),
        ("ignore_eos", "1"),
        ("top_k", "[1]"),
    ],
)
def test_impossible_parameters_change_nothing(conversation: Conversation, name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        conversation.set_parameter(name, value)
    assert conversation.params == PARAMS


def test_a_switch_of_the_template_is_a_switch_of_the_chat(chat_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "m"))
    shutil.copyfile(HYBRID, folder / "chat_template.jinja")
    tokenizer = Tokenizer.from_folder(folder)
    engine = Engine.of(load_model(folder), EngineConfig(max_num_seqs=1))
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
        assert tokenizer.decode(talk._prompt("", turns).token_ids).endswith(ending)


def test_a_thought_that_the_model_opens_is_no_answer(conversation: Conversation) -> None:
    parser = conversation._parser("possible")
    assert parser is not None, "the vocabulary has the marks"
    events = [*parser.push("<think>\nhm\n</think>\n\nHello"), *parser.finish()]
    assert [(type(event).__name__, event.text) for event in events] == [("Reasoning", "hm"), ("Content", "Hello")]
    assert conversation.answer("Hi", silent) and conversation.turns[-1].reasoning_content is None
