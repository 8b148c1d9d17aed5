"""Which format a folder speaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.text.chat import ChatFormat, recognise
from qnext.text.jinja import JinjaTemplate
from qnext.text.messages import Message
from qnext.text.native import NATIVE_FORMATS
from qnext.text.prompts import ChatPrompt
from qnext.text.templates import INSTRUCT_TEMPLATE, KNOWN_TEMPLATES, THINKING_TEMPLATE, template_hash
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import byte_level_tokenizer, save_tokenizer

from .conversations import HELLO, TOOLS
from .test_native import file

OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def folder(trained_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_folder, tmp_path / "model"))


def set_config(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (INSTRUCT_TEMPLATE, "instruct"),
        (THINKING_TEMPLATE, "thinking"),
        (file("Qwen3-Coder.jinja"), "coder"),
        (INSTRUCT_TEMPLATE.strip() + "\n\n", "instruct"),
        (file("Qwen-Qwen3-0.6B.jinja"), "jinja"),
        (file("Qwen-Qwen2.5-7B-Instruct.jinja"), "jinja"),
        (file("Qwen-QwQ-32B.jinja"), "jinja"),
        (OTHER, "jinja"),
    ],
)
def test_the_format_of_a_folder(folder: Path, template: str, name: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert ChatFormat.for_folder(folder).name == name
    (folder / "chat_template.jinja").unlink()
    set_config(folder, template)
    assert ChatFormat.for_folder(folder).name == name


@pytest.mark.parametrize(
    ("template", "name"),
    [(INSTRUCT_TEMPLATE, "instruct"), (THINKING_TEMPLATE, "thinking"), (file("Qwen3-Coder.jinja"), "coder")],
)
def test_an_edited_template_is_known_by_what_it_does(folder: Path, template: str, name: str) -> None:
    edited = "{# a comment #}" + template
    assert template_hash(edited) not in KNOWN_TEMPLATES
    assert recognise(JinjaTemplate(edited)) == name
    (folder / "chat_template.jinja").write_text(edited, encoding="utf-8")
    chat = ChatFormat.for_folder(folder)
    assert (chat.name, chat.template) == (name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<|im_start|>assistant\\n", "<|im_start|>assistant\\n\\n"),
        ("'\\n<tool_response>\\n'", "'<tool_response>\\n'"),
        ("not loop.first", "false"),
        ("has_system", "false"),
        ("content or not", "content | length > 20 or not"),
        ("+ content +", "+ content | trim +"),
        ("tools %}", "tools and has_system %}"),
    ],
)
def test_a_template_that_does_something_else_is_not_taken_for_ours(old: str, new: str) -> None:
    changed = INSTRUCT_TEMPLATE.replace(old, new)
    assert changed != INSTRUCT_TEMPLATE
    assert recognise(JinjaTemplate(changed)) is None


def test_the_file_wins_over_the_config(folder: Path) -> None:
    set_config(folder, OTHER)
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE, encoding="utf-8")
    assert ChatFormat.for_folder(folder).name == "thinking"


def test_foreign_template_with_variables(folder: Path) -> None:
    set_config(folder, OTHER)
    pieces = ChatFormat.for_folder(folder).render([HELLO])
    assert "".join(piece.text for piece in pieces) == f"[user]{HELLO.content}<|im_end|>"


def test_list_form_with_a_template_for_tools(folder: Path) -> None:
    set_config(
        folder,
        [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
            {"name": "rag", "template": "x"},
        ],
    )
    chat = ChatFormat.for_folder(folder)
    assert "".join(piece.text for piece in chat.render([HELLO])) == "plain"
    assert "".join(piece.text for piece in chat.render([HELLO], tools=TOOLS)) == "tools"
    set_config(folder, [{"name": "default", "template": INSTRUCT_TEMPLATE}])
    assert ChatFormat.for_folder(folder).name == "instruct"


def test_no_template_is_told_and_completion_still_works(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no chat template.*can complete text but not chat"):
        ChatFormat.for_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("It still completes.")) == "It still completes."


@pytest.mark.parametrize("value", [3, {}, [3], [{"name": "default"}], [{"name": "other", "template": "x"}]])
def test_malformed_template_entry(folder: Path, value: object) -> None:
    set_config(folder, value)
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer_config\.json: chat_template"):
        ChatFormat.for_folder(folder)


def test_a_hostile_template_does_not_keep_a_folder_from_loading(folder: Path) -> None:
    """It fails when it is used, with the file's name."""
    (folder / "chat_template.jinja").write_text("{{ 'a' * 2000000000 }}", encoding="utf-8")
    chat = ChatFormat.for_folder(folder)
    with pytest.raises(CorruptCheckpoint, match=r"chat_template\.jinja: the chat template needs more than"):
        chat.render([HELLO])


def test_unreadable_template_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptCheckpoint, match=r"chat_template\.jinja"):
        ChatFormat.for_folder(folder)
    (folder / "chat_template.jinja").write_text("x" * ((1 << 20) + 1), encoding="utf-8")
    with pytest.raises(CorruptCheckpoint, match="longer than"):
        ChatFormat.for_folder(folder)


def test_chat_without_turn_tokens_is_told(tmp_path: Path) -> None:
    bare = byte_level_tokenizer(special_tokens=[])
    save_tokenizer(bare, tmp_path, model_max_length=99, chat_template=INSTRUCT_TEMPLATE, eos_token="!", pad_token="!")
    with pytest.raises(CorruptCheckpoint, match=r"<\|im_start\|>.*chat needs it"):
        ChatFormat.for_folder(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"<\|im_start\|>.*chat needs it"):
        ChatPrompt([HELLO]).encode(ChatFormat.native("instruct"), Tokenizer(bare))


@pytest.mark.parametrize("name", [*NATIVE_FORMATS, "jinja"])
@pytest.mark.parametrize("messages", [[], [Message("nobody", "x")]])
def test_no_conversation(folder: Path, name: str, messages: list[Message]) -> None:
    set_config(folder, OTHER)
    chat = ChatFormat.for_folder(folder) if name == "jinja" else ChatFormat.native(name)
    with pytest.raises(UsageError, match=r"empty|unknown role 'nobody'"):
        chat.render(messages)
