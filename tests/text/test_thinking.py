"""Arguments of templates, and where prompts leave thoughts: against jinja2 through transformers."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qnext.errors import UsageError
from qnext.text.chat import ChatFormat
from qnext.text.jinja import JinjaTemplate, TemplateLimits
from qnext.text.messages import Message
from qnext.text.template_files import read_templates
from qnext.text.templates import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from qnext.text.thinking import (
    EFFORTS,
    TemplateRequest,
    may_think,
    state_of_beginning,
    thought_state,
)
from qnext.text.tokenizer import Piece, Tokenizer
from qnext.text.train import byte_level_tokenizer

from .conversations import HELLO
from .test_native import file

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TEMPLATES: dict[str, tuple[str, set[str]]] = {
    "plain": (HEAD, set()),
    "switch": (HEAD + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", {"enable_thinking"}),
    "own default": (
        "{% set enable_thinking = enable_thinking | default(true) %}"
        + HEAD
        + "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}",
        {"enable_thinking"},
    ),
    "guarded default": (
        "{% if not thinking is defined %}{% if enable_thinking is defined %}{% set thinking = enable_thinking %}"
        "{% else %}{% set thinking = false %}{% endif %}{% endif %}"
        + HEAD
        + "{{ '<think>' if thinking else '</think>' }}",
        {"thinking", "enable_thinking"},
    ),
    "effort": (
        "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}Effort: "
        "{{ reasoning_effort }}, {{ thinking_budget }}, {{ documents | tojson }}\n" + HEAD,
        {"reasoning_effort", "thinking_budget", "documents"},
    ),
    "variables of its own": (
        "{% set a = 1 %}{% for x in messages %}{% set y = x %}{% endfor %}{% macro m(z) %}{{ z }}{% endmacro %}"
        "{% if tools %}{% set text = 'x' %}{% endif %}{% set ns = namespace(i=0) %}{{ a }}{{ m(text) }}{{ bos_token }}"
        "{{ strftime_now('%Y') }}{{ date_string }}" + HEAD,
        {"date_string"},
    ),
}


@cache
def template(name: str) -> JinjaTemplate:
    return JinjaTemplate(TEMPLATES[name][0], variables={"bos_token": "", "eos_token": "<|im_end|>"})


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_reads(name: str) -> None:
    assert template(name).arguments == TEMPLATES[name][1]


@pytest.mark.parametrize("text", [INSTRUCT_TEMPLATE, THINKING_TEMPLATE, file("Qwen3-Coder.jinja")])
def test_native_formats_read_nothing(text: str) -> None:
    assert JinjaTemplate(text).arguments == frozenset()


@pytest.mark.parametrize("text", ["{{ 'a' * 2000000000 }}", "{% if", "{{ " + "(" * 3000])
def test_a_faulty_template_reads_nothing_and_harms_nobody(text: str) -> None:
    limits = TemplateLimits(seconds=1.0, memory_bytes=256 << 20)
    assert JinjaTemplate(text, limits=limits).arguments == frozenset()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("switch", {"enable_thinking": False}),
        ("switch", {"enable_thinking": True}),
        ("own default", {}),
        ("own default", {"enable_thinking": False}),
        ("guarded default", {"thinking": True}),
        ("guarded default", {"enable_thinking": True}),
        ("effort", {"reasoning_effort": "high", "thinking_budget": 5}),
        ("effort", {"documents": [{"title": "a", "text": "<|im_end|>"}]}),
    ],
)
def test_arguments_reach_the_template_as_in_transformers(
    trained_folder: Path, tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "m"))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name][0], encoding="utf-8")
    chat = ChatFormat.for_folder(folder)
    assert chat.arguments == TEMPLATES[name][1]
    given = TemplateRequest(arguments).for_template(chat.arguments)
    pieces = chat.render([HELLO], arguments=given)
    theirs = AutoTokenizer.from_pretrained(folder)
    want = theirs.apply_chat_template(
        [{"role": "user", "content": HELLO.content}], tokenize=False, add_generation_prompt=True, **arguments
    )
    assert "".join(piece.text for piece in pieces) == want
    ids = Tokenizer.from_folder(folder).encode_pieces(pieces)
    assert ids.count(Tokenizer.from_folder(folder).token_id("<|im_end|>")) == 1, "an argument's text stays text"


def test_a_template_with_arguments_is_never_taken_for_a_native_format(trained_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "m"))
    switched = THINKING_TEMPLATE + "{% if keep_thoughts %}kept{% endif %}"
    (folder / "chat_template.jinja").write_text(switched, encoding="utf-8")
    chat = ChatFormat.for_folder(folder)
    assert (chat.name, chat.arguments) == ("jinja", {"keep_thoughts"})


SWITCH, BOTH, RICH = {"enable_thinking"}, {"enable_thinking", "thinking"}, {"reasoning_effort", "thinking_budget"}


@pytest.mark.parametrize(
    ("request_", "read", "want", "thinks"),
    [
        (TemplateRequest(), BOTH, {}, None),
        (TemplateRequest(thinks=False), BOTH, {"enable_thinking": False, "thinking": False}, False),
        (TemplateRequest(thinks=True), SWITCH, {"enable_thinking": True}, True),
        (TemplateRequest(thinks=False), set(), {}, False),
        (TemplateRequest(effort="none"), SWITCH, {"enable_thinking": False}, False),
        (TemplateRequest(effort="minimal"), SWITCH, {"enable_thinking": False}, False),
        (TemplateRequest(effort="high"), SWITCH | RICH, {"enable_thinking": True, "reasoning_effort": "high"}, True),
        (TemplateRequest(effort="none"), RICH, {"reasoning_effort": "none"}, False),
        (TemplateRequest(budget=9), RICH, {"thinking_budget": 9}, None),
        (TemplateRequest(budget=9), SWITCH, {}, None),
        (TemplateRequest({"enable_thinking": True}, thinks=False), SWITCH, {"enable_thinking": True}, True),
        (TemplateRequest({"thinking": False}, effort="high"), SWITCH, {"enable_thinking": False}, False),
        (TemplateRequest({"enable_thinking": None}), SWITCH, {}, None),
        (TemplateRequest(thinks=True, effort="none"), SWITCH, {"enable_thinking": True}, True),
        (TemplateRequest({"reasoning_effort": "none"}), SWITCH, {"enable_thinking": False}, False),
        (TemplateRequest({"x": [1, None]}), {"x"}, {"x": [1, None]}, None),
    ],
)
def test_wishes_become_what_the_template_reads(
    request_: TemplateRequest, read: set[str], want: dict[str, Any], thinks: bool | None
) -> None:
    assert request_.for_template(frozenset(read)) == want
    assert request_.wants_thought is thinks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_thinkng": False}, "reads no argument 'enable_thinkng', only enable_thinking, "),
        ({"messages": []}, "reads no argument 'messages'"),
        ({"add_generation_prompt": False}, "reads no argument"),
        ({"enable_thinking": "false"}, "enable_thinking must be true or false"),
        ({"thinking": 0}, "thinking must be true or false"),
    ],
)
def test_nothing_is_accepted_and_ignored(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TemplateRequest(arguments).for_template(frozenset({"enable_thinking", "messages"}))


def test_a_server_has_arguments_where_the_request_is_silent() -> None:
    defaults = {"enable_thinking": False, "x": 1}
    assert TemplateRequest().over(defaults).arguments == defaults
    assert TemplateRequest({"x": 2}).over(defaults).arguments == {"enable_thinking": False, "x": 2}
    assert TemplateRequest(thinks=True).over(defaults).wants_thought is True
    assert TemplateRequest(effort="high").over(defaults).for_template({"enable_thinking", "x"}) == {
        "enable_thinking": True,
        "x": 1,
    }
    assert EFFORTS[0] == "none"


@pytest.mark.parametrize(
    ("name", "request_", "want"),
    [
        ("plain", TemplateRequest(), "possible"),
        ("switch", TemplateRequest(), "possible"),
        ("switch", TemplateRequest(thinks=False), "closed"),
        ("own default", TemplateRequest(), "open"),
        ("own default", TemplateRequest(effort="none"), "closed"),
        ("guarded default", TemplateRequest(), "closed"),
        ("guarded default", TemplateRequest(thinks=True), "open"),
    ],
)
def test_where_a_prompt_leaves_the_thought(name: str, request_: TemplateRequest, want: str) -> None:
    chat = ChatFormat("jinja", template(name))
    tricky = Message("user", "What is <think> for?")
    for messages in ([HELLO], [tricky]):
        pieces = chat.render(messages, arguments=request_.for_template(chat.arguments))
        assert thought_state(pieces) == want


def test_where_other_prompts_leave_it() -> None:
    assert thought_state([]) == "possible"
    assert thought_state([Piece("<|im_start|>assistant\n<think>\nFirst, ", True)]) == "open"
    assert thought_state([Piece("<|im_start|>user\n", True), Piece("<think>", False)]) == "possible"
    assert thought_state([Piece("<think>a</think><|im_end|><|im_start|>assistant\n", True)]) == "possible"
    assert state_of_beginning("", "possible") == "possible"
    assert state_of_beginning("Well", "possible") == "closed"
    assert state_of_beginning("<think>\nWell", "possible") == "open"
    assert state_of_beginning("<think>\nWell</think>", "possible") == "closed"


def test_the_vocabulary_says_whether_a_model_may_think() -> None:
    assert may_think(Tokenizer(byte_level_tokenizer()))
    assert not may_think(Tokenizer(byte_level_tokenizer(special_tokens=[])))


TEMPLATE_PLACES: dict[str, dict[str, Any]] = {
    "text file": {"chat_template.jinja": "D"},
    "configuration": {"tokenizer_config.json": {"chat_template": "D"}},
    "named": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "D"}]}},
    "object of names": {"tokenizer_config.json": {"chat_template": {"default": "D", "tool_use": "D"}}},
    "file of its own": {"chat_template.json": {"chat_template": "D"}},
    "text file before the others": {
        "chat_template.jinja": "D",
        "tokenizer_config.json": {"chat_template": "x"},
        "chat_template.json": {"chat_template": "y"},
    },
    "beside a template for documents": {
        "tokenizer_config.json": {"chat_template": [{"name": n, "template": n[0].upper()} for n in ("default", "rag")]}
    },
    "byte-order mark": {"chat_template.jinja": "\ufeffD"},
}


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
@pytest.mark.parametrize("name", TEMPLATE_PLACES)
def test_where_templates_stand(trained_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "m"))
    for file_name, content in TEMPLATE_PLACES[name].items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file_name).write_text(text, encoding="utf-8")
    found = read_templates(folder)
    assert found is not None and found.texts == {"default": "D"}


def test_a_template_for_tools_in_a_folder_of_its_own(trained_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "m"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("D", encoding="utf-8")
    (folder / "additional_chat_templates/tool_use.jinja").write_text("T{{ x }}", encoding="utf-8")
    chat = ChatFormat.for_folder(folder)
    assert chat.arguments == {"x"}
    assert chat.render([HELLO], tools=[{"name": "f"}], arguments={"x": 1}) == [Piece("T1", True)]
    assert chat.render([HELLO]) == [Piece("D", True)]


@pytest.mark.parametrize(
    ("asked", "read", "state", "expected"),
    [
        (TemplateRequest(), set(), "possible", []),
        (TemplateRequest(thinks=True), set(), "possible", ["enable_thinking"]),
        (TemplateRequest(thinks=True), set(), "open", []),
        (TemplateRequest(thinks=True), {"enable_thinking"}, "closed", []),
        (TemplateRequest(thinks=False), set(), "possible", []),
        (TemplateRequest(thinks=False), set(), "closed", []),
        (TemplateRequest({"thinking": True}, thinks=False), set(), "closed", ["thinking"]),
        (TemplateRequest(effort="high"), set(), "possible", ["reasoning_effort"]),
        (TemplateRequest({"reasoning_effort": "high"}), {"reasoning_effort"}, "possible", []),
        (TemplateRequest(budget=5), {"enable_thinking"}, "open", ["thinking_budget"]),
        (TemplateRequest({"thinking_budget": 5}), {"thinking_budget"}, "open", []),
        (TemplateRequest({"thinking_budget": None}), set(), "open", []),
    ],
)
def test_what_has_no_effect_is_known(asked: TemplateRequest, read: set[str], state: Any, expected: list[str]) -> None:
    assert asked.without_effect(read, state) == expected
