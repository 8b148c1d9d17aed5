"""What the native formats write, the parsers read back."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.text.messages import Message, ToolCall
from qnext.text.native import NATIVE_FORMATS
from qnext.text.output import Call, Content, Reasoning
from tests.text.output.outputs import read

TYPES = {
    "text": "string",
    "count": "integer",
    "size": "number",
    "flag": "boolean",
    "none": "null",
    "object": "object",
    "list": "array",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "tool",
        "parameters": {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}},
    },
}
letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
strings = st.one_of(
    letters, st.sampled_from(["</tool_call>", "<tool_call>\n", "</think>", '{"a": "}', "None", "3", "\n\n"])
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), numbers, strings),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(letters, inner, max_size=3)),
    max_leaves=8,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": strings,
        "count": st.integers(),
        "size": st.one_of(numbers, st.integers()),
        "flag": st.booleans(),
        "none": st.none(),
        "object": st.dictionaries(letters, values, max_size=3),
        "list": st.lists(values, max_size=3),
    },
)
contents = letters.map(str.strip).filter(lambda text: "<" not in text)


def answer(style: str, message: Message) -> str:
    """What stands behind the generation prompt when the message is the last of a conversation."""
    conversation = [Message("user", "?")]
    before = "".join(piece.text for piece in NATIVE_FORMATS[style](conversation, [TOOL], True))
    whole = "".join(piece.text for piece in NATIVE_FORMATS[style]([*conversation, message], [TOOL], False))
    assert whole.startswith(before) and whole.endswith("<|im_end|>\n")
    return whole[len(before) : -len("<|im_end|>\n")]


def parsed(events: list) -> list:
    return [(event.name, json.loads(event.arguments)) if isinstance(event, Call) else event for event in events]


@settings(max_examples=200, deadline=None)
@given(contents, st.lists(arguments, min_size=1, max_size=3))
def test_instruct(content: str, calls: list[dict[str, Any]]) -> None:
    message = Message("assistant", content, tool_calls=tuple(ToolCall("tool", call) for call in calls))
    events = read([answer("instruct", message)], tools=[TOOL])
    assert parsed(events) == [*([Content(content)] if content else []), *(("tool", call) for call in calls)]
    assert [event.arguments for event in events if isinstance(event, Call)] == [
        json.dumps(call, ensure_ascii=False) for call in calls
    ]


@settings(max_examples=100, deadline=None)
@given(contents, st.lists(arguments, min_size=1, max_size=2), contents)
def test_thinking(content: str, calls: list[dict[str, Any]], thought: str) -> None:
    message = Message("assistant", content, thought, tuple(ToolCall("tool", call) for call in calls))
    events = read([answer("thinking", message)], tools=[TOOL], starts_in_reasoning=True)
    expected = [*([Reasoning(thought)] if thought else []), *([Content(content)] if content else [])]
    assert parsed(events) == [*expected, *(("tool", call) for call in calls)]


@settings(max_examples=200, deadline=None)
@given(contents, st.lists(arguments, min_size=1, max_size=3))
def test_coder(content: str, calls: list[dict[str, Any]]) -> None:
    message = Message("assistant", content, tool_calls=tuple(ToolCall("tool", call) for call in calls))
    text = answer("coder", message)
    events = read([text], tool_style="xml", tools=[TOOL])
    assert parsed(events) == [*([Content(content)] if content else []), *(("tool", call) for call in calls)]
    bare = text.replace("\n<tool_call>\n<function=tool>", "\n<function=tool>")
    if not any("tool_call>" in json.dumps(call) for call in calls):
        assert parsed(read([bare], tool_style="xml", tools=[TOOL])) == parsed(events)
