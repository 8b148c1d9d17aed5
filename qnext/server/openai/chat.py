"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from qnext.engine.sampling.constraint import Constraint
from qnext.errors import QnextError
from qnext.server.answers import Answer, chat_logprob, prompt_logprobs, timings, usage_counts
from qnext.server.bodies import KEEPS_UNKNOWN, Body, Name, SamplingBody
from qnext.server.dialogue import make_dialogue
from qnext.server.errors import ApiError, error_object, from_user_error
from qnext.server.exchange import Exchange
from qnext.server.generation import Generation, Update
from qnext.server.history import Note, part_text, without_attribution
from qnext.server.limits import MAX_CONTENT_PARTS, MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOL_CALLS, MAX_TOOLS
from qnext.server.routes import EventStream, Reply
from qnext.server.sampling import sampling_params, stop_strings, structured_constraint
from qnext.server.tools import Collected, FunctionBody, Offer, Origin, Tools, free_input, free_text
from qnext.server.writing import Event, data_frames, write_stream, write_whole
from qnext.text.messages import Message, ToolCall
from qnext.text.output import (
    Call,
    CallArguments,
    CallCut,
    CallEnd,
    CallStart,
    Content,
    CutCall,
    OutputEvent,
    Reasoning,
    joined,
)


class PartBody(Body):
    """A part of a message. Of those that are no text, what names them is read."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    refusal: str | None = None
    file: Any = None


Parts = Annotated[list[PartBody], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]


class CalledFunction(Body):
    name: Annotated[str, Field(max_length=256)]
    arguments: str | dict[str, Any] | None = None


class CalledCustom(Body):
    name: Annotated[str, Field(max_length=256)]
    input: str | None = None


class CallBody(Body):
    id: Name | None = None
    function: CalledFunction | None = None
    custom: CalledCustom | None = None


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Parts | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[CallBody], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    function_call: CalledFunction | None = None  # how tool_calls were written before there were several


class SchemaBody(Body):
    name: Annotated[str, Field(max_length=128)] | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class FormatBody(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TemplateArguments(Body):
    enable_thinking: bool | None = None


class ChatBody(SamplingBody):
    """The body of a chat completion."""

    model_config = KEEPS_UNKNOWN

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None  # once `tools`
    function_call: str | dict[str, Any] | None = None  # and once `tool_choice`
    response_format: FormatBody | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def content_text(content: str | Sequence[PartBody] | None, *, param: str, is_past: bool, note: Note) -> str:
    """Text of a message: parts that are none have a short text in their place where they are of the past.

    Raises ApiError 400 for those of the present question. Nothing is ever fetched.
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
    """The messages as chat formats read them. `note` is told of what the model cannot read."""
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
            calls.append(ToolCall(call.function.name, call.function.arguments or {}, call.id))
        elif call.custom is not None:
            calls.append(ToolCall(call.custom.name, {"input": call.custom.input or ""}, call.id))
        else:
            raise ApiError.bad("a call needs a function", param=f"{param}.tool_calls")
    if body.function_call is not None and not calls:
        calls.append(ToolCall(body.function_call.name, body.function_call.arguments or {}))
    return tuple(calls)


def response_constraint(body: ChatBody) -> tuple[Constraint, str] | None:
    """The constraint that response_format says, or vLLM's fields."""
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


def offer_of(body: ChatBody, note: Note) -> Offer:
    """The tools of a body, in the form of today or in that of `functions`. Raises ApiError 400."""
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


async def chat_completions(exchange: Exchange) -> Reply | EventStream:
    body: ChatBody = exchange.body
    served = exchange.server.served
    exchange.server.check_model(exchange, body.model)
    offer = offer_of(body, exchange.ignore)
    effort = body.reasoning_effort
    wants_thought = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError.bad("continue_final_message excludes add_generation_prompt", param="continue_final_message")
    try:
        messages = conversation(body.messages, exchange.ignore)
        dialogue = await make_dialogue(
            exchange, messages, offer, constraint=response_constraint(body),
            parallel_calls=body.parallel_tool_calls is not False and not body.functions, stop=stop_strings(body),
            stops_in_thought=bool(body.stop_in_reasoning),
            thinks=wants_thought is not False and effort != "none", continues=bool(body.continue_final_message),
            add_generation_prompt=body.add_generation_prompt is not False,
        )  # fmt: skip
    except QnextError as error:
        raise from_user_error(error, param="messages") from None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError.bad("top_logprobs needs logprobs", param="top_logprobs")
    params = sampling_params(
        body, served, exchange.server.limits, num_prompt=len(dialogue.prompt_ids),
        max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None, prompt_logprobs=body.prompt_logprobs,
    )  # fmt: skip
    guide = await exchange.server.guide(dialogue.constraint, param=dialogue.constraint_param)
    writer = _ChatWriter(exchange, body, offer, [dialogue.new_answer(exchange) for _ in range(params.n)])
    generating = exchange.generate(dialogue.prompt_ids, params, guide=guide, salt=body.cache_salt)
    if body.stream:
        exchange.outcome.stream = True
        return EventStream(write_stream(exchange, generating, writer))
    return Reply.of(writer.completion(await write_whole(generating, writer)))


class _ChatWriter:
    """One chat completion while it is written: chunks, or the choices of a whole one."""

    def __init__(self, exchange: Exchange, body: ChatBody, offer: Offer, answers: list[Answer]) -> None:
        self.exchange = exchange
        self.body = body
        self.offer = offer
        self.answers = answers
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._events: list[list[OutputEvent]] = [[] for _ in answers]  # of a whole completion
        self._num_logged = [0] * len(answers)  # tokens whose log-probabilities are sent
        self._num_calls = [0] * len(answers)  # that have begun
        self._inputs: list[list[str] | None] = [None] * len(answers)  # pieces of a custom tool's arguments

    frames = staticmethod(data_frames)

    def completion(self, generation: Generation) -> dict[str, Any]:
        choices = [self._choice(index, found) for index, found in enumerate(self._events)]
        if self.body.return_token_ids:
            for choice, request in zip(choices, generation.requests, strict=True):
                choice["token_ids"] = list(request.output_ids)
        document = {**self._head("chat.completion"), "choices": choices, "usage": self._usage(generation)}
        if self.body.return_token_ids:
            document["prompt_token_ids"] = list(generation.prompt_ids)
        if self.body.prompt_logprobs is not None:
            sampled = generation.requests[0].prompt_sampled
            document["prompt_logprobs"] = prompt_logprobs(self.exchange.server.served, sampled)
        if self.body.timings:
            document["timings"] = timings(generation.requests[0])
        return document

    def begin(self, generation: Generation) -> list[Event]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self.answers))]

    def take(self, update: Update, generation: Generation) -> list[Event]:
        answer = self.answers[update.index]
        was_open = answer.end_reason is None
        events = answer.take(update, generation)
        if not self.body.stream:
            self._events[update.index] += events
            return []
        chunks = self._deltas(update.index, events)
        if was_open and answer.end_reason is not None:
            chunks.append(self._chunk(update.index, {}, finish_reason=self._reason(update.index)))
        return chunks

    def ping(self) -> Event:
        open_answers = (index for index, answer in enumerate(self.answers) if answer.end_reason is None)
        return self._chunk(next(open_answers, 0), {})

    def end(self, generation: Generation) -> list[Event]:
        self.exchange.outcome.finish_reason = self.answers[0].end_reason
        document: dict[str, Any] = {**self._head("chat.completion.chunk"), "choices": []}
        if self._has_usage:
            document["usage"] = self._usage(generation)
        if self.body.timings:
            document["timings"] = timings(generation.requests[0])
        return [document] if len(document) > 5 else []

    def fail(self, error: ApiError) -> list[Event]:
        return [error_object(error, "openai")]

    def _head(self, kind: str) -> dict[str, Any]:
        name = self.exchange.server.served.name
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> Event:
        choice = {"index": index, "delta": delta, "finish_reason": None, **more}
        document = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._has_usage:
            document["usage"] = None
        return document

    def _deltas(self, index: int, events: list[OutputEvent]) -> list[Event]:
        deltas = [delta for event in events if (delta := self._delta(index, event)) is not None]
        logged = self._new_logprobs(index)
        if logged and not deltas:
            deltas.append({"content": ""})
        chunks = [self._chunk(index, delta) for delta in deltas[1:]]
        if deltas:
            chunks.insert(0, self._chunk(index, deltas[0], **({"logprobs": {"content": logged}} if logged else {})))
        return chunks

    def _delta(self, index: int, event: OutputEvent) -> dict[str, Any] | None:
        match event:
            case Content():
                return {"content": event.text}
            case Reasoning():
                return {"reasoning_content": event.text, "reasoning": event.text}
            case CallStart() | CallArguments() | CallEnd() | CallCut():
                return self._call_delta(index, event)
        return None

    def _call_delta(self, index: int, event: CallStart | CallArguments | CallEnd | CallCut) -> dict[str, Any] | None:
        """A piece of a call, in the form in which its tool was offered. The input of a custom tool comes whole."""
        if self.body.functions:
            if isinstance(event, CallStart):
                return {"function_call": {"name": event.name, "arguments": ""}}
            return {"function_call": {"arguments": event.text}} if isinstance(event, CallArguments) else None
        if isinstance(event, CallStart):
            self._num_calls[index] += 1
            self._inputs[index] = [] if event.name in self.offer.origins else None
            call = _call(event.name, "", self.offer.origins)
            return {"tool_calls": [{"index": self._num_calls[index] - 1, **call}]}
        held = self._inputs[index]
        place = {"index": self._num_calls[index] - 1}
        if isinstance(event, CallArguments):
            if held is None:
                return {"tool_calls": [{**place, "function": {"arguments": event.text}}]}
            held.append(event.text)
        elif held is not None:
            return {"tool_calls": [{**place, "custom": {"input": free_input("".join(held))}}]}
        return None

    def _new_logprobs(self, index: int) -> list[dict[str, Any]]:
        if not self.body.logprobs:
            return []
        tokens = self.answers[index].tokens[self._num_logged[index] :]
        self._num_logged[index] += len(tokens)
        served = self.exchange.server.served
        as_id = bool(self.body.return_tokens_as_token_ids)
        return [chat_logprob(served, token, self.body.top_logprobs or 0, as_id=as_id) for token in tokens]

    @property
    def _has_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _choice(self, index: int, events: list[OutputEvent]) -> dict[str, Any]:
        parts = joined(events)
        content = "".join(part.text for part in parts if isinstance(part, Content))
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        calls = [part for part in parts if isinstance(part, (Call, CutCall))]
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls or reasoning else "")}
        message["refusal"] = None
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls and self.body.functions:
            message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
        elif calls:
            message["tool_calls"] = [_call(call.name, call.arguments, self.offer.origins) for call in calls]
        logged = self._new_logprobs(index)
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": logged} if self.body.logprobs else None,
            "finish_reason": self._reason(index),
        }

    def _reason(self, index: int) -> str | None:
        reason = self.answers[index].end_reason
        return "function_call" if reason == "tool_calls" and self.body.functions else reason

    def _usage(self, generation: Generation) -> dict[str, Any]:
        return usage(*usage_counts(generation, self.answers))


def usage(prompt: int, cached: int, generated: int, reasoning: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _call(name: str, arguments: str, origins: Mapping[str, Origin]) -> dict[str, Any]:
    head = {"id": f"call_{secrets.token_hex(12)}"}
    if name in origins:  # a custom tool
        return {**head, "type": "custom", "custom": {"name": name, "input": free_input(arguments)}}
    return {**head, "type": "function", "function": {"name": name, "arguments": arguments}}
