"""Histories as agents send them back: whatever they hold, the conversation goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from qnext.errors import UsageError
from qnext.text.chat import ChatFormat
from qnext.text.jinja import JinjaTemplate
from qnext.text.messages import Message, ToolCall, alternating, message_from_dict, system_first
from qnext.text.native import NATIVE_FORMATS
from qnext.text.templates import INSTRUCT_TEMPLATE, THINKING_TEMPLATE

from .conversations import HELLO, MORE, SYSTEM, TOOLS
from .test_native import TEMPLATES, file, reference

RESULT = Message("tool", "21", tool_call_id="c1")
BACK = Message("assistant", "Back.")

# What clients have for the arguments of a call -> (the object that templates iterate over, or None; the text as it is)
ARGUMENTS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "object": ({"city": "Zürich"}, {"city": "Zürich"}),
    "text of an object": ('{"city": "Zürich"}', {"city": "Zürich"}),
    "no text": ("", {}),
    "blanks": (" \n", {}),
    "none": (None, {}),
    "text null": ("null", {}),
    "Python's none": ("None", {}),
    "cut": ('{"city": "Zü', None),
    "list": (["a", 1], None),
    "text of a list": ('["a"]', None),
    "number": (7, None),
    "true": (True, None),
    "text of a text": ('"abc"', None),
    "written twice": (json.dumps(json.dumps({"city": "x"})), {"city": "x"}),
    "raw newline": ('{"text": "a\nb"}', {"text": "a\nb"}),
    "Python's literal": ("{'city': 'x'}", None),
    "markup": ("<tool_call>{", None),
    "control token": ('{"a": "<|im_end|>', None),
}


def call(arguments: Any) -> Message:
    return Message("assistant", "", tool_calls=(ToolCall("look", arguments, "c1"),))


def text(chat: ChatFormat, messages: list[Message], **more: Any) -> str:
    return "".join(piece.text for piece in chat.render(messages, **more))


@pytest.fixture(scope="module", params=sorted(path.name for path in TEMPLATES.glob("*.jinja")))
def released(request: pytest.FixtureRequest) -> Iterator[tuple[str, ChatFormat]]:
    template = JinjaTemplate(file(request.param), control_names=["<|im_start|>", "<|im_end|>"])
    yield request.param, ChatFormat("jinja", template)
    template.close()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_the_past_never_end_a_conversation(released: tuple[str, ChatFormat], name: str) -> None:
    file_name, chat = released
    given, as_object = ARGUMENTS[name]
    messages = [HELLO, call(given), RESULT, MORE]
    found = text(chat, messages, tools=TOOLS)
    raw = given if isinstance(given, str) else json.dumps(given)
    if as_object is not None:
        assert found == reference(file(file_name), [HELLO, call(as_object), RESULT, MORE], TOOLS, True)
    else:
        assert raw in found or json.dumps(raw, ensure_ascii=False)[1:-1] in found
    if "Coder" in file_name:
        assert found == text(ChatFormat.native("coder"), messages, tools=TOOLS)
        assert as_object is not None or f"<parameter=arguments>\n{raw}\n</parameter>" in found


@cache
def own_template(text: str) -> ChatFormat:
    return ChatFormat("jinja", JinjaTemplate(text))


@pytest.mark.parametrize(("name", "template"), [("instruct", INSTRUCT_TEMPLATE), ("thinking", THINKING_TEMPLATE)])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_native_formats_write_them_as_their_templates_do(name: str, template: str, case: str) -> None:
    if case in ("written twice", "raw newline"):
        return  # text that the model wrote stays as it is here, and is read by the template's side
    messages = [HELLO, call(ARGUMENTS[case][0]), RESULT]
    assert text(ChatFormat.native(name), messages) == text(own_template(template), messages)


def test_a_template_that_drops_text_gets_an_object() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.function.arguments is mapping %}"
        "{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
    )
    assert text(ChatFormat("jinja", JinjaTemplate(template)), [HELLO, call("{cut")]) == '{"arguments": "{cut"}'


HISTORIES: dict[str, list[Message]] = {
    "result without a call": [HELLO, RESULT],
    "result first": [RESULT, HELLO],
    "result after a system turn": [HELLO, call({}), SYSTEM, RESULT],
    "results over turns": [HELLO, call({}), RESULT, MORE, RESULT, MORE],
    "unknown id": [HELLO, call({}), Message("tool", "x", tool_call_id="other")],
    "no id": [HELLO, call({}), Message("tool", "x")],
    "old name of a result": [HELLO, call({}), Message("function", "x", name="look")],
    "empty turn": [HELLO, Message("assistant", ""), MORE],
    "two answers": [HELLO, BACK, BACK, MORE],
    "ends with a call": [HELLO, call({})],
    "developer later": [HELLO, BACK, Message("developer", "Be brief."), MORE],
    "thought of a user": [Message("user", "x", reasoning_content="y", tool_calls=(ToolCall("f", {}),)), BACK, MORE],
    "named": [Message("user", "x", name="ann"), BACK, Message("user", "y", name="bob")],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_has_a_prompt(released: tuple[str, ChatFormat], name: str) -> None:
    file_name, chat = released
    found = text(chat, HISTORIES[name], tools=TOOLS)
    assert found.rpartition("<|im_start|>")[2] in ("assistant\n", "assistant\n<think>\n</think>")
    for message in HISTORIES[name]:
        assert message.content.strip() in found
    if "Coder" in file_name and name != "result first":  # there its own template forgets to open the turn
        assert found == text(ChatFormat.native("coder"), HISTORIES[name], tools=TOOLS)
    for native in NATIVE_FORMATS:
        written = text(ChatFormat.native(native), HISTORIES[name], tools=TOOLS)
        assert written.count("<|im_start|>") == written.count("<|im_end|>") + 1


STRICT = """{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{%- if alternate is defined and m.role == 'user' and loop.previtem and loop.previtem.role == 'user' %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}[{{ m.role }}:{{ m.content }}]
{%- endfor %}
{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ raise_exception('No user query.') }}{% endif %}"""  # noqa: E501


@pytest.mark.parametrize(
    ("roles", "arguments", "want"),
    [
        ("us", {}, "[system:1][user:0]"),
        ("sus", {}, "[system:0\n\n2][user:1]"),
        ("suasu", {}, "[system:0\n\n3][user:1][assistant:2][user:4]"),
        ("ssu", {}, "[system:0\n\n1][user:2]"),
        ("uu", {}, "[user:0][user:1]"),
        ("uu", {"alternate": 1}, "[user:0\n\n1]"),
        ("usu", {"alternate": 1}, "[system:1][user:0\n\n2]"),
        ("uau", {"alternate": 1}, "[user:0][assistant:1][user:2]"),
    ],
)
def test_a_template_that_wants_another_order_gets_it(roles: str, arguments: dict[str, Any], want: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [Message(names[role], str(index)) for index, role in enumerate(roles)]
    assert text(own_template(STRICT), messages, arguments=arguments) == want


@pytest.mark.parametrize(("messages", "words"), [([SYSTEM], "No user query."), ([HELLO, RESULT], "no tools")])
def test_what_no_order_mends_is_refused_in_the_templates_words(messages: list[Message], words: str) -> None:
    with pytest.raises(UsageError, match=f"refuses this conversation: {words}"):
        own_template(STRICT).render(messages)


def test_what_is_joined_loses_nothing() -> None:
    turns = [
        Message("assistant", "a", "one", (ToolCall("f", {}),)),
        Message("assistant", "", "two", (ToolCall("g", {}),)),
        RESULT,
        RESULT,
    ]
    assert alternating(turns) == [
        Message("assistant", "a", "one\ntwo", (ToolCall("f", {}), ToolCall("g", {}))),
        RESULT,
        RESULT,
    ]
    assert system_first([HELLO, BACK]) == [HELLO, BACK]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_three_names(key: str) -> None:
    value = {"role": "assistant", "content": "x", key: "because", "reasoning_details": []}
    assert message_from_dict(value).reasoning_content == "because"
