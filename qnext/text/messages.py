"""A conversation as the chat formats see it: messages, tool calls, and what makes a list of them a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnext.errors import UsageError

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made. `arguments` is an object, or its JSON text exactly as the model wrote it."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None

    def arguments_object(self) -> Mapping[str, Any]:
        """The arguments as an object. Raises UsageError where the text is not one."""
        if not isinstance(self.arguments, str):
            return self.arguments
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UsageError(f"tool call {self.name!r}: arguments are not a JSON object")
        return value


@dataclass(frozen=True)
class Message:
    """One turn. `reasoning_content` None means unknown (it may stand inside `content`), "" means none."""

    role: str
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


def message_from_dict(value: Mapping[str, Any]) -> Message:
    """Message from its OpenAI form: `content` a string, null or a list of text parts; `tool_calls` with JSON text.

    Raises UsageError for other shapes. Keys that no chat format uses are ignored.
    """
    role = value.get("role")
    if not isinstance(role, str):
        raise UsageError("a message needs a role")
    reasoning = value.get("reasoning_content")
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
    )


def message_to_dict(message: Message) -> dict[str, Any]:
    """The form that chat templates read: arguments as objects where they are, absent parts left out."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        value["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        value["tool_calls"] = [_tool_call_dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    return value


def checked_conversation(messages: Sequence[Message]) -> list[Message]:
    """The messages with `developer` read as `system`, the name that the templates know.

    Raises UsageError for an empty conversation, an unknown role, a tool result that answers nothing, and for parts
    that only an assistant can have.
    """
    if not messages:
        raise UsageError("the conversation is empty")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise UsageError(f"message {index}: unknown role {message.role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(message.content, str):
            raise UsageError(f"message {index}: content must be a string")
        if message.role != "assistant" and (message.tool_calls or message.reasoning_content is not None):
            raise UsageError(f"message {index}: only an assistant has tool_calls or reasoning_content")
        if message.role == "tool" and (not checked or checked[-1].role not in ("assistant", "tool")):
            raise UsageError(f"message {index}: a tool result must follow the assistant's call or another result")
        checked.append(replace(message, role="system") if message.role == "developer" else message)
    return checked


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
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, (str, Mapping)):
        raise UsageError(f"tool call {function['name']!r}: arguments must be an object or its JSON text")
    return ToolCall(name=function["name"], arguments=arguments, id=value.get("id"))


def _tool_call_dict(call: ToolCall) -> dict[str, Any]:
    try:
        arguments: Mapping[str, Any] | str = call.arguments_object()
    except UsageError:
        arguments = call.arguments
    value: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    if call.id is not None:
        value["id"] = call.id
    return value
