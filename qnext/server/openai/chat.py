"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import AliasChoices, Field

from qnext.engine.sampling.constraint import Constraint
from qnext.errors import QnextError
from qnext.server.answers import Answer, chat_logprob, timings, usage_counts
from qnext.server.bodies import Body, Effort, Name, SamplingBody, TemplateBody, ThoughtBody
from qnext.server.dialogue import make_dialogue
from qnext.server.errors import ApiError, error_body, from_user_error
from qnext.server.exchange import Exchange
from qnext.server.generation import Generation
from qnext.server.limits import MAX_CONTENT_PARTS, MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOL_CALLS
from qnext.server.routes import EventStream, Reply
from qnext.server.sampling import sampling_params, stop_strings, structured_constraint
from qnext.server.tools import ToolBody, Tools, function_tool, offered
from qnext.text.messages import Message, ToolCall
from qnext.text.output import Call, Content, OutputEvent, Reasoning
from qnext.text.thinking import TemplateRequest

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


class PartBody(Body):
    type: Annotated[str, Field(max_length=64)]
    text: str | None = None


Parts = Annotated[list[PartBody], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]


class CalledFunction(Body):
    name: Annotated[str, Field(max_length=256)]
    arguments: Any = None  # of the past: whatever it is


class CallBody(Body):
    id: Name | None = None
    function: CalledFunction


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, validation_alias=AliasChoices("reasoning", "thinking"))
    tool_calls: Annotated[list[CallBody], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: Name | None = None


class SchemaBody(Body):
    name: Annotated[str, Field(max_length=128)] | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class FormatBody(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ReasoningBody(Body):
    """How OpenRouter's clients say it."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None


class ChatPromptBody(TemplateBody):
    """What makes the prompt of a chat completion beside the messages."""

    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningBody | None = None
    thinking: ThoughtBody | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def template_request(self) -> TemplateRequest:
        """Of several words for one thing the more special one counts. Raises ApiError 400."""
        reasoning, thinking = self.reasoning or ReasoningBody(), self.thinking
        return self.asked(
            thinks=reasoning.enabled if thinking is None or thinking.is_wanted is None else thinking.is_wanted,
            effort=self.reasoning_effort or reasoning.effort,
            budget=reasoning.max_tokens if thinking is None else thinking.budget_tokens,
        )


class ChatBody(ChatPromptBody, SamplingBody):
    """The body of a chat completion."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: FormatBody | None = None


def content_text(content: str | Sequence[PartBody] | None, *, param: str) -> str:
    """Text of a message. Raises ApiError 400 for parts that are no text: nothing is ever fetched."""
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        text = part.text if part.type in ("text", "input_text", "output_text") else None
        if text is None:
            raise ApiError.bad("this model reads text only", param=param, code="unsupported_content")
        texts.append(text)
    return "".join(texts)


def conversation(bodies: Sequence[MessageBody]) -> list[Message]:
    """The messages as chat formats read them."""
    messages: list[Message] = []
    for index, body in enumerate(bodies):
        param = f"messages.{index}"
        reasoning = body.reasoning_content if body.reasoning_content is not None else body.reasoning
        calls = tuple(
            ToolCall(call.function.name, call.function.arguments or {}, call.id) for call in body.tool_calls or ()
        )
        if body.role != "assistant" and (calls or reasoning is not None):
            raise ApiError.bad("only an assistant's message has tool_calls or reasoning", param=param)
        messages.append(
            Message(body.role, content_text(body.content, param=param), reasoning, calls, body.tool_call_id)
        )
    return messages


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
    return Constraint("json_schema", schema), "response_format"


async def chat_completions(exchange: Exchange) -> Reply | EventStream:
    body: ChatBody = exchange.body
    served = exchange.server.served
    exchange.server.check_model(exchange, body.model)
    tools = [tool_of(tool, index) for index, tool in enumerate(body.tools or ())]
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError.bad("continue_final_message excludes add_generation_prompt", param="continue_final_message")
    try:
        messages = conversation(body.messages)
        dialogue = await make_dialogue(
            exchange, messages, offered(tools, body.tool_choice), constraint=response_constraint(body),
            parallel_calls=body.parallel_tool_calls is not False, stop=stop_strings(body),
            asked=body.template_request(), continues=bool(body.continue_final_message),
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
    run = _Run(exchange, body, [dialogue.new_answer(exchange) for _ in range(params.n)])
    generation = exchange.generate(dialogue.prompt_ids, params, guide=guide, salt=body.cache_salt)
    if body.stream:
        exchange.outcome.stream = True
        return EventStream(run.stream(generation))
    return await run.whole(generation)


class _Run:
    """One chat completion while it is written."""

    def __init__(self, exchange: Exchange, body: ChatBody, answers: list[Answer]) -> None:
        self.exchange = exchange
        self.body = body
        self.answers = answers
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._num_logged = [0] * len(answers)  # tokens whose log-probabilities are sent
        self._num_calls = [0] * len(answers)

    async def whole(self, generating: Any) -> Reply:
        events: list[list[OutputEvent]] = [[] for _ in self.answers]
        async with generating as generation:
            async for updates in generation.updates():
                for update in updates:
                    events[update.index] += self.answers[update.index].take(update, generation)
        choices = [self._choice(index, found) for index, found in enumerate(events)]
        if self.body.return_token_ids:
            for choice, request in zip(choices, generation.requests, strict=True):
                choice["token_ids"] = list(request.output_ids)
        document = {**self._head("chat.completion"), "choices": choices, "usage": self._usage(generation)}
        if self.body.return_token_ids:
            document["prompt_token_ids"] = list(generation.prompt_ids)
        if self.body.timings:
            document["timings"] = timings(generation.requests[0])
        self._note()
        return Reply.of(document)

    async def stream(self, generating: Any) -> AsyncGenerator[bytes, None]:
        has_begun = False
        try:
            async with generating as generation:
                async for updates in generation.updates():
                    frames = [] if has_begun or not updates else [self._first(i) for i in range(len(self.answers))]
                    has_begun = has_begun or bool(updates)
                    for update in updates:
                        answer = self.answers[update.index]
                        was_open = answer.end_reason is None
                        frames += self._deltas(update.index, answer.take(update, generation))
                        if was_open and answer.end_reason is not None:
                            frames.append(self._chunk(update.index, {}, finish_reason=answer.end_reason))
                    yield b"".join(frames) if updates else PING
                self._note()
                yield self._last(generation) + DONE
        except ApiError as error:
            if not self.exchange.is_replying:
                raise
            self.exchange.outcome.error_code = error.code
            yield b"data: " + error_body(error, "openai") + b"\n\n" + DONE

    def _head(self, kind: str) -> dict[str, Any]:
        name = self.exchange.server.served.name
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": None, **more}
        document = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._has_usage:
            document["usage"] = None
        return b"data: " + orjson.dumps(document) + b"\n\n"

    def _first(self, index: int) -> bytes:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def _deltas(self, index: int, events: list[OutputEvent]) -> list[bytes]:
        deltas: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Content):
                deltas.append({"content": event.text})
            elif isinstance(event, Reasoning):
                deltas.append({"reasoning_content": event.text, "reasoning": event.text})
            else:
                deltas.append({"tool_calls": [{"index": self._num_calls[index], **_call(event)}]})
                self._num_calls[index] += 1
        logged = self._new_logprobs(index)
        if logged and not deltas:
            deltas.append({"content": ""})
        frames = [self._chunk(index, delta) for delta in deltas[1:]]
        if deltas:
            frames.insert(0, self._chunk(index, deltas[0], **({"logprobs": {"content": logged}} if logged else {})))
        return frames

    def _new_logprobs(self, index: int) -> list[dict[str, Any]]:
        if not self.body.logprobs:
            return []
        tokens = self.answers[index].tokens[self._num_logged[index] :]
        self._num_logged[index] += len(tokens)
        served = self.exchange.server.served
        return [chat_logprob(served, token, self.body.top_logprobs or 0) for token in tokens]

    def _last(self, generation: Generation) -> bytes:
        document: dict[str, Any] = {**self._head("chat.completion.chunk"), "choices": []}
        if self._has_usage:
            document["usage"] = self._usage(generation)
        if self.body.timings:
            document["timings"] = timings(generation.requests[0])
        return b"data: " + orjson.dumps(document) + b"\n\n" if len(document) > 5 else b""

    @property
    def _has_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _choice(self, index: int, events: list[OutputEvent]) -> dict[str, Any]:
        content = "".join(event.text for event in events if isinstance(event, Content))
        reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
        calls = [_call(event) for event in events if isinstance(event, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls or reasoning else "")}
        message["refusal"] = None
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            message["tool_calls"] = calls
        logged = self._new_logprobs(index)
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": logged} if self.body.logprobs else None,
            "finish_reason": self.answers[index].end_reason,
        }

    def _usage(self, generation: Generation) -> dict[str, Any]:
        return usage(*usage_counts(generation, self.answers))

    def _note(self) -> None:
        self.exchange.outcome.finish_reason = self.answers[0].end_reason


def usage(prompt: int, cached: int, generated: int, reasoning: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _call(event: Call) -> dict[str, Any]:
    function = {"name": event.name, "arguments": event.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def tool_of(tool: ToolBody, index: int) -> dict[str, Any]:
    if tool.type != "function" or tool.function is None:
        raise ApiError.bad("a tool must be of type function", param=f"tools.{index}")
    return function_tool(tool.function.name, tool.function.description, tool.function.parameters)
