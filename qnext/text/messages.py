"""A conversation as the chat formats see it: messages, tool calls, and the rules for a list of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from qnext.errors import UsageError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_AS = {"developer": "system", "function": "tool"}  # the names that templates know
RAW_ARGUMENT = "arguments"  # the one argument of a call whose text is no object


@dataclass(frozen=True)
class ToolCall:
    """A call of the assistant. `arguments` is an object, or its JSON text exactly as the model wrote it.

    Other values for the arguments are accepted too: null and blanks mean no arguments, and a value that is neither text
    nor object is taken as its JSON text.
    """

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None

    def __post_init__(self) -> None:
        arguments: Any = self.arguments
        if not isinstance(arguments, (str, Mapping)):
            arguments = {} if arguments is None else json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str) and arguments.strip() in ("", "null", "None"):
            arguments = {}
        object.__setattr__(self, "arguments", arguments)

    def parsed_arguments(self) -> Mapping[str, Any] | None:
        """The arguments as an object; None for a text that holds no object. JSON inside a JSON text is read too."""
        value: Any = self.arguments
        for _ in range(2):
            if isinstance(value, str):
                try:
                    value = json.loads(value, strict=False)
                except (ValueError, RecursionError):
                    return None
        return value if isinstance(value, Mapping) else None

    def arguments_object(self) -> Mapping[str, Any]:
        """The arguments as an object. A text that holds no object becomes its only argument."""
        parsed = self.parsed_arguments()
        return {RAW_ARGUMENT: self.arguments} if parsed is None else parsed


@dataclass(frozen=True)
class Message:
    """One turn. `reasoning_content` None means unknown (it may be inside `content`), "" means none."""

    role: str
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


def message_from_dict(value: Mapping[str, Any]) -> Message:
    """Message from its OpenAI form: `content` a string, null or a list of text parts; `tool_calls` with JSON text.

    A thought may stand under `reasoning_content`, `reasoning` or `thinking`. Raises UsageError for other shapes. Keys
    that no chat format uses are ignored.
    """
    role = value.get("role")
    if not isinstance(role, str):
        raise UsageError("a message needs a role")
    thoughts = [value.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
    reasoning = next((thought for thought in thoughts if thought is not None), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise UsageError("reasoning_content must be a string")
    calls = value.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UsageError("tool_calls must be a list")
    return Message(
        role=role,
        content=_content_text(value.get("content")),
        reasoning_content=reasoning,
        tool_calls=tuple(_tool_call(call) for call in calls),
        tool_call_id=value.get("tool_call_id"),
        name=value.get("name"),
    )


def message_to_dict(message: Message, *, with_objects: bool = False) -> dict[str, Any]:
    """The form that chat templates read: arguments as objects where they are, absent parts left out.

    `with_objects`: arguments that are text without an object are an object, too.
    """
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        value["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        value["tool_calls"] = [_tool_call_dict(call, with_objects=with_objects) for call in message.tool_calls]
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        value["name"] = message.name
    return value


def raw_arguments(messages: Sequence[Message]) -> list[str]:
    """The arguments of calls that are text without an object in it."""
    calls = (call for message in messages for call in message.tool_calls)
    return [call.arguments for call in calls if isinstance(call.arguments, str) and call.parsed_arguments() is None]


def checked_conversation(messages: Sequence[Message]) -> list[Message]:
    """The messages under the roles that templates know: `developer` is `system`, `function` is `tool`.

    Content that does not belong to a role is left out, such as calls and thoughts in turns that are not the
    assistant's. Raises UsageError for an empty conversation and for an unknown role.
    """
    if not messages:
        raise UsageError("the conversation is empty")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise UsageError(f"message {index}: unknown role {message.role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(message.content, str):
            raise UsageError(f"message {index}: content must be a string")
        if message.role != "assistant":
            message = replace(message, tool_calls=(), reasoning_content=None)
        checked.append(replace(message, role=_AS.get(message.role, message.role)))
    return checked


def system_first(messages: Sequence[Message]) -> list[Message]:
    """All system messages joined at the beginning, in their order, for templates that require this."""
    systems = [message for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    return [*([_joined(systems)] if systems else []), *others]


def alternating(messages: Sequence[Message]) -> list[Message]:
    """The messages with neighbours of one role joined, except results of tools."""
    found: list[Message] = []
    for role, group in groupby(messages, key=lambda message: message.role):
        turns = list(group)
        found += turns if role == "tool" else [_joined(turns)]
    return found


def _joined(messages: Sequence[Message]) -> Message:
    thoughts = [message.reasoning_content for message in messages if message.reasoning_content]
    return replace(
        messages[0],
        content="\n\n".join(message.content for message in messages if message.content),
        reasoning_content="\n".join(thoughts) if thoughts else messages[0].reasoning_content,
        tool_calls=tuple(call for message in messages for call in message.tool_calls),
    )


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools as given. Raises UsageError unless each is an object with a function name."""
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UsageError(f"tool {index}: a tool is an object with a function name")
    return list(tools)


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UsageError("content must be a string or a list of text parts")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise UsageError("content parts other than text are not supported")
        texts.append(text)
    return "".join(texts)


def _tool_call(value: Any) -> ToolCall:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError("a tool call needs a function name")
    arguments: Any = function.get("arguments")
    return ToolCall(function["name"], arguments, value.get("id"))


def _tool_call_dict(call: ToolCall, *, with_objects: bool) -> dict[str, Any]:
    parsed = call.arguments_object() if with_objects else call.parsed_arguments()
    arguments = call.arguments if parsed is None else parsed
    value: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    if call.id is not None:
        value["id"] = call.id
    return value
