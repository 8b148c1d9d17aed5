"""Bodies of OpenAI's responses API, and the conversation that their items make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from qnext.server.body.strict import (
    KEEPS_UNKNOWN,
    Body,
    Effort,
    Logprobs,
    MaxTokens,
    Name,
    Options,
    Temperature,
    TemplateBody,
    TopP,
    at_most,
)
from qnext.server.errors import ApiError
from qnext.server.limits import MAX_CONTENT_PARTS, MAX_MESSAGES, MAX_TOOLS
from qnext.server.surfaces.history import Note, part_text, without_attribution
from qnext.server.surfaces.openai.foreign import CLIENT_TOOLS, is_known, joined_name, messages_of
from qnext.server.surfaces.tools import Collected, Offer, Origin, ToolName, free_text
from qnext.text.messages import Message, ToolCall

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class ResponsePartBody(Body):
    """A part of a message. Of a part that is no text, only its name is read."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    refusal: str | None = None
    filename: str | None = None


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


_ResponseParts = Annotated[list[ResponsePartBody], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]
ResponseParts = Annotated[_ResponseParts, BeforeValidator(_as_parts, json_schema_input_type=str | _ResponseParts)]


class MessageItem(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: ResponseParts | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: Name
    name: Name
    namespace: Name | None = None
    arguments: Any = None  # of the past: whatever it is


class ResultItem(Body):
    type: Literal["function_call_output"]
    call_id: Name
    output: ResponseParts | None = None


class ReasoningItem(Body):
    type: Literal["reasoning"]
    summary: _ResponseParts | None = None
    content: _ResponseParts | None = None


class OtherItem(Body):
    """Calls of tools that are no functions, their results, and items that only another server can read."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(max_length=64)]


def _item_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None or kind == "message":
        return "message"
    return kind if kind in ("function_call", "function_call_output", "reasoning") else "other"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_kind),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Items = Annotated[_Items, BeforeValidator(_as_items, json_schema_input_type=str | _Items)]


class FunctionTool(Body):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomTool(Body):
    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: dict[str, Any] | None = None


class OtherTool(Body):
    """A tool that its type describes, or that a server runs."""

    type: Annotated[str, Field(max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    execution: Any = None
    environment: dict[str, Any] | None = None


def _inner_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else "function"
    return kind if kind in ("function", "custom", "namespace") else "other"


_Inner = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[OtherTool, Tag("namespace")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(_inner_kind),
]


class NamespaceTool(Body):
    """Functions that share the name of a namespace."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[list[_Inner], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


ResponseTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(_inner_kind),
]
ResponseTools = Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
_TOOLS: TypeAdapter[list[Any]] = TypeAdapter(ResponseTools)


class ResponseFormatBody(Options):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=128)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextBody(Options):
    format: ResponseFormatBody | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseReasoningBody(Options):
    effort: Effort | None = None
    summary: Annotated[str, Field(max_length=64)] | None = None


_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class ResponseBody(TemplateBody):
    """The body of a response."""

    model_config = KEEPS_UNKNOWN

    model: Annotated[str, Field(max_length=512)] | None = None
    input: Items
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Logprobs | None = None
    include: Annotated[list[_MetadataKey], Field(max_length=64, fail_fast=True)] | None = None
    tools: ResponseTools | None = None
    tool_choice: Annotated[str, Field(max_length=64)] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: ResponseReasoningBody | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None  # nothing is cut: what is too long is refused
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], at_most(16)] | None = None
    store: bool | None = None  # nothing is kept, whatever it says: clients have it true by default
    background: bool | None = None  # refused, as all that needs something kept
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None


def conversation(body: ResponseBody, note: Note) -> list[Message]:
    """Instructions and items as messages. What an assistant wrote in one turn is one message. Raises ApiError 400.

    `note` is told of content that the model cannot read.
    """
    messages: list[Message] = []
    instructions = without_attribution(body.instructions or "")
    if instructions:
        messages.append(Message("system", instructions))
    for index, item in enumerate(body.input):
        param = f"input.{index}"
        is_past = index < len(body.input) - 1
        if isinstance(item, ResultItem):
            text = _text(item.output, f"{param}.output", note)
            messages.append(Message("tool", text, tool_call_id=item.call_id))
        elif isinstance(item, OtherItem):
            if not is_known(item.type) and is_past:
                note(item.type)
                continue
            if not is_known(item.type):
                raise ApiError.bad("an item must be a message, a call, its output or reasoning", param=param)
            for message in messages_of(item.type, item.model_extra or {}, note, param):
                _add_turn(messages, message)
        elif isinstance(item, MessageItem) and item.role != "assistant":
            text = _text(item.content, f"{param}.content", note, is_past=is_past or item.role != "user")
            if item.role != "user":
                text = without_attribution(text)
            if text or item.role == "user":
                messages.append(Message(item.role, text))
        else:
            _add(messages, item, param, note)
    return messages


def offer(body: ResponseBody, note: Note) -> Offer:
    """The tools of a body, and those that a search of its client found. Raises ApiError 400.

    `note` is told of tools that neither the client nor this server runs.
    """
    found = Collected()
    for index, tool in enumerate(body.tools or ()):
        _collect(found, tool, note, f"tools.{index}")
    for index, item in enumerate(body.input):
        if isinstance(item, OtherItem) and item.type in ("tool_search_output", "additional_tools"):
            try:
                more = _TOOLS.validate_python((item.model_extra or {}).get("tools") or [])
            except ValidationError:
                raise ApiError.bad("the tools of an item are invalid", param=f"input.{index}.tools") from None
            for tool in more:
                _collect(found, tool, note, f"input.{index}.tools")
    return found.offered(body.tool_choice)


def _collect(found: Collected, tool: Any, note: Note, param: str, namespace: NamespaceTool | None = None) -> None:
    space = None if namespace is None else namespace.name
    if isinstance(tool, NamespaceTool):
        for inner in tool.tools or ():
            _collect(found, inner, note, param, tool)
    elif isinstance(tool, (FunctionTool, CustomTool)):
        description = tool.description
        if namespace is not None and namespace.description and namespace.tools and tool is namespace.tools[0]:
            # What is said of all stands once, with the first.
            description = f"{namespace.name}: {namespace.description}\n{description or ''}".rstrip()
        is_custom = isinstance(tool, CustomTool)
        origin = Origin(tool.type, tool.name, space) if is_custom or space is not None else None
        parameters = free_text(tool.format) if isinstance(tool, CustomTool) else tool.parameters
        is_strict = tool.strict if isinstance(tool, FunctionTool) else None
        name = joined_name(space, tool.name)
        found.add(name, description, parameters, origin=origin, is_strict=is_strict, param=param)
    elif tool.type in CLIENT_TOOLS and _is_of_client(tool):
        description, parameters = CLIENT_TOOLS[tool.type]
        found.add(
            tool.type,
            tool.description or description,
            tool.parameters or parameters,
            origin=Origin(tool.type, tool.type),
            param=param,
        )
    else:
        note(tool.type)


def _is_of_client(tool: OtherTool) -> bool:
    """Whether the client runs the tool itself, and not a server for it."""
    if tool.type == "tool_search":
        return tool.execution == "client"
    return tool.environment is None or tool.environment.get("type") == "local"


def _add(messages: list[Message], item: MessageItem | CallItem | ReasoningItem, param: str, note: Note) -> None:
    if isinstance(item, CallItem):
        call = ToolCall(joined_name(item.namespace, item.name), item.arguments, item.call_id)
        _add_turn(messages, Message("assistant", "", tool_calls=(call,)))
    elif isinstance(item, MessageItem):
        _add_turn(messages, Message("assistant", _text(item.content, f"{param}.content", note)))
    else:
        thought = _text(item.content or item.summary, param, note)
        _add_turn(messages, Message("assistant", "", reasoning_content=thought))


def _add_turn(messages: list[Message], turn: Message) -> None:
    """Add a call, a text or a thought to the assistant's turn that is being read, or begin another one with it."""
    last = messages[-1] if messages and messages[-1].role == "assistant" and turn.role == "assistant" else None
    if last is None:
        found = turn
    elif turn.tool_calls:
        found = replace(last, tool_calls=(*last.tool_calls, *turn.tool_calls))
    elif turn.reasoning_content is not None:
        if last.content or last.tool_calls:
            last, found = None, turn
        else:
            thoughts = (last.reasoning_content or "", turn.reasoning_content)
            found = replace(last, reasoning_content="\n".join(thought for thought in thoughts if thought))
    elif last.content:  # a second text is a turn of its own; a thought or calls alone wait for theirs
        last, found = None, turn
    else:
        found = replace(last, content=turn.content)
    if last is not None:
        messages.pop()
    messages.append(found)


def _text(parts: Sequence[ResponsePartBody] | None, param: str, note: Note, *, is_past: bool = True) -> str:
    texts: list[str] = []
    for part in parts or ():
        if part.type in _TEXTS or part.type == "refusal":
            texts.append((part.refusal if part.type == "refusal" else part.text) or "")
        else:
            held = {"filename": part.filename, "text": part.text}
            texts.append(part_text(part.type, held, is_past=is_past, param=param, note=note))
    return "".join(texts)
