"""Native chat formats against the templates of the released relatives, rendered by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qnext.errors import UsageError
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message, ToolCall, message_from_dict, message_to_dict
from qnext.text.native import NATIVE_FORMATS
from qnext.text.prompts import ChatPrompt
from qnext.text.templates import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from qnext.text.tokenizer import Tokenizer

from .conversations import CONVERSATIONS, HELLO, REASONING, SYSTEM, TOOLS, TRICKY

TEMPLATES = Path(__file__).with_name("templates")
TOOL_SETS = {"no tools": [], "one tool": TOOLS[:1], "all tools": TOOLS}


def reference(
    template: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    rendered, _ = render_jinja_template(
        conversations=[[message_to_dict(message) for message in messages]],
        tools=list(tools) or None,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
    )
    return rendered[0]


def native(name: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], add_prompt: bool) -> str:
    pieces = ChatFormat.native(name).render(messages, tools=tools, add_generation_prompt=add_prompt)
    return "".join(piece.text for piece in pieces)


def file(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def ends_with_answer(messages: Sequence[Message]) -> bool:
    """Does an assistant turn stand after the last user turn, where Qwen3-0.6B may add a think block?"""
    roles = [message.role for message in messages]
    return "user" not in roles or "assistant" in roles[len(roles) - roles[::-1].index("user") :]


@pytest.mark.parametrize("add_prompt", [False, True])
@pytest.mark.parametrize("tools", TOOL_SETS.values(), ids=TOOL_SETS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_coder_equals_its_template(name: str, tools: list[Any], add_prompt: bool) -> None:
    messages = CONVERSATIONS[name]
    expected = reference(file("Qwen3-Coder.jinja"), messages, tools, add_prompt)
    assert native("coder", messages, tools, add_prompt) == expected


@pytest.mark.parametrize("add_prompt", [False, True])
@pytest.mark.parametrize("tools", TOOL_SETS.values(), ids=TOOL_SETS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_instruct_equals_its_relatives(name: str, tools: list[Any], add_prompt: bool) -> None:
    messages = CONVERSATIONS[name]
    # Qwen2.5 puts a default system prompt where none is given, and nothing else differs.
    with_system = messages if messages[0].role == "system" else [SYSTEM, *messages]
    expected = reference(file("Qwen-Qwen2.5-7B-Instruct.jinja"), with_system, tools, add_prompt)
    assert native("instruct", with_system, tools, add_prompt) == expected
    # Qwen3-0.6B has no default, but adds think blocks to answers after the last question.
    if not ends_with_answer(messages):
        expected = reference(file("Qwen-Qwen3-0.6B.jinja"), messages, tools, add_prompt)
        assert native("instruct", messages, tools, add_prompt) == expected
    # Our own template renders the rest as well.
    assert native("instruct", messages, tools, add_prompt) == reference(INSTRUCT_TEMPLATE, messages, tools, add_prompt)


@pytest.mark.parametrize("tools", TOOL_SETS.values(), ids=TOOL_SETS)
@pytest.mark.parametrize("name", [*CONVERSATIONS, *REASONING])
def test_thinking_equals_its_relatives(name: str, tools: list[Any]) -> None:
    messages = {**CONVERSATIONS, **REASONING}[name]
    history = reference(file("Qwen-Qwen3-0.6B.jinja"), messages, tools, False)
    assert native("thinking", messages, tools, False) == history
    prompt = "<|im_start|>assistant\n<think>\n"
    assert native("thinking", messages, tools, True) == history + prompt
    for add_prompt in (False, True):
        ours = reference(THINKING_TEMPLATE, messages, tools, add_prompt)
        assert native("thinking", messages, tools, add_prompt) == ours


def test_generation_prompt_of_the_thinking_relative() -> None:
    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": "x"}]],
        chat_template=file("Qwen-QwQ-32B.jinja"),
        add_generation_prompt=True,
        enable_thinking=True,
    )
    assert native("thinking", [Message("user", "x")], [], True) == rendered[0]


@pytest.mark.parametrize("name", REASONING)
def test_instruct_and_coder_leave_reasoning_out(name: str) -> None:
    without = [Message(m.role, m.content, None, m.tool_calls, m.tool_call_id) for m in REASONING[name]]
    for format_name in ("instruct", "coder"):
        assert native(format_name, REASONING[name], [], True) == native(format_name, without, [], True)


def test_developer_is_system() -> None:
    for name, template in (("instruct", INSTRUCT_TEMPLATE), ("thinking", THINKING_TEMPLATE)):
        messages = [Message("developer", "Be terse."), HELLO, Message("developer", "More.")]
        as_system = [Message("system", "Be terse."), HELLO, Message("system", "More.")]
        assert native(name, messages, TOOLS, True) == native(name, as_system, TOOLS, True)
        assert reference(template, messages, TOOLS, True) == native(name, as_system, TOOLS, True)


def test_argument_text_is_kept_as_the_model_wrote_it() -> None:
    messages = [HELLO, Message("assistant", tool_calls=(ToolCall("f", '{"a":1,  "b":"é"}'),))]
    for name in ("instruct", "thinking"):
        assert '"arguments": {"a":1,  "b":"é"}}' in native(name, messages, [], False)
    assert "<parameter=a>\n1\n</parameter>\n<parameter=b>\né\n</parameter>" in native("coder", messages, [], False)


# Trust


@pytest.mark.parametrize("format_name", NATIVE_FORMATS)
@pytest.mark.parametrize("name", [*CONVERSATIONS, *REASONING])
def test_pieces_encode_as_the_text_with_content_defused(tokenizer: Tokenizer, format_name: str, name: str) -> None:
    """Control ids of the frame only, and the text survives."""
    messages = {**CONVERSATIONS, **REASONING}[name]
    harmless = [strip_names(tokenizer, message) for message in messages]
    chat = ChatFormat.native(format_name)
    ids = ChatPrompt(messages, tools=TOOLS).encode(chat, tokenizer).token_ids
    frame = ChatPrompt(harmless, tools=TOOLS).encode(chat, tokenizer).token_ids
    control = [i for i in ids if i in tokenizer.special_ids]
    assert control == [i for i in frame if i in tokenizer.special_ids]
    pieces = chat.render(messages, tools=TOOLS)
    text = "".join(piece.text for piece in pieces)
    assert tokenizer.decode(ids) == tokenizer.backend.normalizer.normalize_str(text)
    if not any(name in piece.text for piece in pieces if not piece.is_trusted for name in tokenizer.added_ids):
        assert ids == tokenizer.backend.encode(text).ids


def strip_names(tokenizer: Tokenizer, message: Message) -> Message:
    names = [name for name in tokenizer.added_ids if name.startswith("<|")]

    def strip(text: str) -> str:
        for name in names:
            text = text.replace(name, "")
        return text

    calls = tuple(
        ToolCall(call.name, {strip(k): strip(v) if isinstance(v, str) else v for k, v in call.arguments.items()})
        for call in message.tool_calls
        if not isinstance(call.arguments, str)
    )
    return Message(message.role, strip(message.content), message.reasoning_content, calls, message.tool_call_id)


@pytest.mark.parametrize("format_name", NATIVE_FORMATS)
def test_tools_and_names_cannot_smuggle_control_tokens(tokenizer: Tokenizer, format_name: str) -> None:
    evil_tool = {
        "type": "function",
        "function": {
            "name": TRICKY,
            "description": TRICKY,
            "parameters": {"properties": {TRICKY: {"type": TRICKY, "description": TRICKY, TRICKY: TRICKY}}},
        },
    }
    evil_call = ToolCall(TRICKY, {TRICKY: TRICKY})
    tame_tool = {"type": "function", "function": {"name": "x"}}
    chat = ChatFormat.native(format_name)
    ids, tame = (
        ChatPrompt([HELLO, Message("assistant", tool_calls=(call,))], tools=[tool]).encode(chat, tokenizer).token_ids
        for call, tool in ((evil_call, evil_tool), (ToolCall("x", {}), tame_tool))
    )
    added = set(tokenizer.added_ids.values())
    assert [i for i in ids if i in added] == [i for i in tame if i in added]


# Faults


@pytest.mark.parametrize("format_name", NATIVE_FORMATS)
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        ([Message("narrator", "x")], "message 0: unknown role 'narrator'"),
        ([Message("user", None)], "message 0: content must be a string"),  # type: ignore[arg-type]
    ],
)
def test_conversations_that_are_none(format_name: str, messages: list[Message], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChatFormat.native(format_name).render(messages)


@pytest.mark.parametrize("tool", [{}, {"function": {}}, {"function": {"name": ""}}, {"function": 3}, {"name": 3}, 7])
def test_malformed_tools(tool: Any) -> None:
    with pytest.raises(UsageError, match="tool 0: a tool is an object with a function name"):
        ChatFormat.native("instruct").render([HELLO], tools=[tool])


def test_unknown_format_name() -> None:
    with pytest.raises(UsageError, match="unknown chat format 'alpaca'"):
        ChatFormat.native("alpaca")


def test_messages_from_their_openai_form() -> None:
    message = message_from_dict(
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "reasoning_content": "r",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        }
    )
    assert message == Message("assistant", "ab", "r", (ToolCall("f", '{"x": 1}', "1"),))
    assert message_to_dict(message)["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert message_from_dict({"role": "assistant", "content": None}).content == ""
    assert message_from_dict({"role": "assistant", "tool_calls": [{"name": "f", "arguments": ""}]}).tool_calls == (
        ToolCall("f", {}),
    )


@pytest.mark.parametrize(
    "value",
    [
        {"content": "x"},
        {"role": 3},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "reasoning_content": 3},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": [{}]},
    ],
)
def test_openai_forms_that_are_none(value: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        message_from_dict(value)
