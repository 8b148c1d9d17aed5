"""The body of a chat completion: its conversation, its tools and the form of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from qnext.engine.sampling.constraint import Constraint
from qnext.server.body.strict import (
    KEEPS_UNKNOWN,
    Body,
    Effort,
    Logprobs,
    MaxTokens,
    Name,
    Options,
    SamplingBody,
    TemplateBody,
    ThoughtBody,
    TokenCount,
)
from qnext.server.errors import ApiError
from qnext.server.limits import MAX_CONTENT_PARTS, MAX_MESSAGES, MAX_TOOL_CALLS, MAX_TOOLS
from qnext.server.surfaces.history import Note, part_text, without_attribution
from qnext.server.surfaces.sampling import structured_constraint
from qnext.server.surfaces.tools import Collected, FunctionBody, Offer, Origin, Tools, free_text
from qnext.text.messages import Message, ToolCall
from qnext.text.thinking import TemplateRequest


class ChatPartBody(Body):
    """A part of a message. Of a part that is no text, only its name is read."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    refusal: str | None = None
    file: Any = None


ChatParts = Annotated[list[ChatPartBody], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]


class CalledFunction(Body):
    name: Annotated[str, Field(max_length=256)]
    arguments: Any = None  # of the past: whatever it is


class CalledCustom(Body):
    name: Annotated[str, Field(max_length=256)]
    input: str | None = None


class CallBody(Body):
    id: Name | None = None
    function: CalledFunction | None = None
    custom: CalledCustom | None = None


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | ChatParts | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, validation_alias=AliasChoices("reasoning", "thinking"))
    tool_calls: Annotated[list[CallBody], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    function_call: CalledFunction | None = None  # how tool_calls were written before there were several


class SchemaBody(Options):
    name: Annotated[str, Field(max_length=128)] | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ChatFormatBody(Options):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ChatReasoningBody(Options):
    """The reasoning options of OpenRouter's clients."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: TokenCount | None = None


class ChatPromptBody(TemplateBody):
    """The fields of a chat completion that make its prompt, beside the messages."""

    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: Annotated[list[FunctionBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None  # once `tools`
    function_call: str | dict[str, Any] | None = None  # and once `tool_choice`
    reasoning_effort: Effort | None = None
    reasoning: ChatReasoningBody | None = None
    thinking: ThoughtBody | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def template_request(self) -> TemplateRequest:
        """What the request asks of the template. Several fields may control thinking; the most specific one counts.
        Raises ApiError 400."""
        reasoning, thinking = self.reasoning or ChatReasoningBody(), self.thinking
        return self.asked(
            thinks=reasoning.enabled if thinking is None or thinking.is_wanted is None else thinking.is_wanted,
            effort=self.reasoning_effort or reasoning.effort,
            budget=reasoning.max_tokens if thinking is None else thinking.budget_tokens,
        )


class ChatBody(ChatPromptBody, SamplingBody):
    """The body of a chat completion."""

    model_config = KEEPS_UNKNOWN

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    parallel_tool_calls: bool | None = None
    response_format: ChatFormatBody | None = None


def content_text(content: str | Sequence[ChatPartBody] | None, *, param: str, is_past: bool, note: Note) -> str:
    """The text of a message. In earlier turns a short text stands in place of parts that are no text.

    Raises ApiError 400 for such parts in the current question. Nothing is ever fetched.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        if part.type in ("text", "input_text", "output_text"):
            texts.append(part.text or "")
        elif part.type == "refusal":
            texts.append(part.refusal or "")
        else:
            held = {"file": part.file} if isinstance(part.file, dict) else {}
            texts.append(part_text(part.type, held, is_past=is_past, param=param, note=note))
    return "".join(texts)


def conversation(bodies: Sequence[MessageBody], note: Note) -> list[Message]:
    """The messages as chat formats read them. `note` is told of content that the model cannot read."""
    messages: list[Message] = []
    for index, body in enumerate(bodies):
        param = f"messages.{index}"
        reasoning = body.reasoning_content if body.reasoning_content is not None else body.reasoning
        calls = _calls_made(body, param)
        if body.role != "assistant" and (calls or reasoning is not None):
            raise ApiError.bad("only an assistant's message has tool_calls or reasoning", param=param)
        is_present = body.role == "user" and index == len(bodies) - 1
        text = content_text(body.content, param=param, is_past=not is_present, note=note)
        if body.role in ("system", "developer"):
            text = without_attribution(text)
            if not text and body.content:
                continue
        role = "tool" if body.role == "function" else body.role
        messages.append(Message(role, text or body.refusal or "", reasoning, calls, body.tool_call_id))
    return messages


def _calls_made(body: MessageBody, param: str) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    for call in body.tool_calls or ():
        if call.function is not None:
            calls.append(ToolCall(call.function.name, call.function.arguments, call.id))
        elif call.custom is not None:
            calls.append(ToolCall(call.custom.name, {"input": call.custom.input or ""}, call.id))
        else:
            raise ApiError.bad("a call needs a function", param=f"{param}.tool_calls")
    if body.function_call is not None and not calls:
        calls.append(ToolCall(body.function_call.name, body.function_call.arguments))
    return tuple(calls)


def response_constraint(body: ChatBody) -> tuple[Constraint, str] | None:
    """The constraint of response_format, or of vLLM's fields."""
    found = structured_constraint(body)
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return found
    if found is not None:
        raise ApiError.bad("an answer can follow one constraint only", param="response_format")
    schema: Any = wanted.schema_
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ApiError.bad("response_format needs json_schema", param="response_format.json_schema")
        schema = wanted.json_schema.schema_
    if schema is None:
        return Constraint("json_object"), "response_format"
    is_strict = wanted.json_schema is not None and bool(wanted.json_schema.strict)
    return Constraint("json_schema", schema, is_strict=is_strict), "response_format"


def offer_of(body: ChatPromptBody, note: Note) -> Offer:
    """The tools of a body, in `tools` or in the older `functions`. Raises ApiError 400."""
    found = Collected()
    choice = body.tool_choice
    for index, tool in enumerate(body.tools or ()):
        if tool.type == "function" and tool.function is not None:
            function = tool.function
            found.add(function.name, function.description, function.parameters, is_strict=function.strict)
        elif tool.type == "custom" and tool.custom is not None:
            custom = tool.custom
            origin = Origin("custom", custom.name)
            found.add(custom.name, custom.description, free_text(custom.format), origin=origin)
        elif tool.type in ("function", "custom") or tool.function is not None:
            raise ApiError.bad("a tool must be of type function, and have one", param=f"tools.{index}")
        else:
            note(tool.type)  # of another server
    if body.functions:
        if body.tools:
            raise ApiError.bad("tools and functions exclude each other", param="functions")
        for function in body.functions:
            found.add(function.name, function.description, function.parameters, param="functions")
        choice = body.function_call
        if isinstance(choice, dict):
            choice = {"type": "function", **choice}
    elif body.function_call is not None:
        raise ApiError.bad("function_call needs functions", param="function_call")
    return found.offered(choice)
