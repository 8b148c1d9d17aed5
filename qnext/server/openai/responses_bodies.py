"""Bodies of OpenAI's responses API, and the conversation that their items make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from qnext.server.bodies import Body, Effort, Name, TemplateBody, at_most
from qnext.server.errors import ApiError
from qnext.server.limits import MAX_CONTENT_PARTS, MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS
from qnext.server.tools import ToolName
from qnext.text.messages import Message, ToolCall

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class PartBody(Body):
    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    refusal: str | None = None


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


_Parts = Annotated[list[PartBody], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]
Parts = Annotated[_Parts, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts)]


class MessageItem(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class CallItem(Body):
    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Any = None  # of the past: whatever it is


class ResultItem(Body):
    type: Literal["function_call_output"]
    call_id: Name
    output: Parts


class ReasoningItem(Body):
    type: Literal["reasoning"]
    summary: _Parts | None = None
    content: _Parts | None = None


class OtherItem(Body):
    """References to what a server keeps, and calls of tools that it runs."""

    type: str


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


class ServerTool(Body):
    """A tool that OpenAI's servers run."""

    type: str


def _tool_kind(value: Any) -> str:
    return "function" if not isinstance(value, dict) or value.get("type") == "function" else "server"


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[ServerTool, Tag("server")], Discriminator(_tool_kind)
]


class FormatBody(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=128)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextBody(Body):
    format: FormatBody | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningBody(Body):
    effort: Effort | None = None


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class ResponseBody(TemplateBody):
    """The body of a response."""

    model: Annotated[str, Field(max_length=512)] | None = None
    input: Items
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[_Key], Field(max_length=64, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[str, Field(max_length=64)] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[_Key, _Value], at_most(16)] | None = None
    store: bool | None = None  # nothing is kept, whatever it says: clients have it true by default
    background: bool | None = None  # refused, as all that needs something kept
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None


def conversation(body: ResponseBody) -> list[Message]:
    """Instructions and items. What an assistant wrote in one turn is one message. Raises ApiError 400."""
    messages: list[Message] = []
    called: set[str] = set()
    if body.instructions is not None:
        messages.append(Message("system", body.instructions))
    for index, item in enumerate(body.input):
        param = f"input.{index}"
        if isinstance(item, ResultItem):
            if item.call_id not in called:
                raise ApiError.bad("no function_call before it has this call_id", param=f"{param}.call_id")
            messages.append(Message("tool", _text(item.output, f"{param}.output"), tool_call_id=item.call_id))
        elif isinstance(item, OtherItem):
            raise ApiError.bad(
                "an item must be a message, a function call, its output or reasoning; this server keeps no responses "
                "and runs no tools", param=param,
            )  # fmt: skip
        else:
            _add(messages, item, param)
            if isinstance(item, CallItem):
                called.add(item.call_id)
    return messages


def _add(messages: list[Message], item: MessageItem | CallItem | ReasoningItem, param: str) -> None:
    if isinstance(item, MessageItem) and item.role != "assistant":
        messages.append(Message(item.role, _text(item.content, f"{param}.content")))
        return
    last = messages[-1] if messages and messages[-1].role == "assistant" else None
    if isinstance(item, CallItem):
        turn = last or Message("assistant", "")
        found = replace(turn, tool_calls=(*turn.tool_calls, ToolCall(item.name, item.arguments or {}, item.call_id)))
    elif isinstance(item, MessageItem):
        # A second text is a turn of its own; a thought or calls alone wait for theirs.
        last = last if last is not None and not last.content else None
        found = replace(last or Message("assistant", ""), content=_text(item.content, f"{param}.content"))
    else:
        last = last if last is not None and not last.content and not last.tool_calls else None
        turn = last or Message("assistant", "")
        parts = item.content or item.summary or ()
        thoughts = [turn.reasoning_content or "", _text(parts, param)]
        found = replace(turn, reasoning_content="\n".join(thought for thought in thoughts if thought))
    if last is not None:
        messages.pop()
    messages.append(found)


def _text(parts: Sequence[PartBody], param: str) -> str:
    texts: list[str] = []
    for part in parts:
        text = part.text if part.type in _TEXTS else part.refusal if part.type == "refusal" else None
        if text is None:
            raise ApiError.bad("this model reads text only", param=param, code="unsupported_content")
        texts.append(text)
    return "".join(texts)
