"""POST /v1/responses. The server stores no responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from qnext.engine.policy.params import SamplingParams
from qnext.engine.sampling.constraint import Constraint
from qnext.server.body.strict import SamplingBody
from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.routes import EventStream, HttpResponse
from qnext.server.surfaces.answers import AnswerReader
from qnext.server.surfaces.dialogue import ChatInput, make_dialogue
from qnext.server.surfaces.openai.response_writer import ResponseWriter
from qnext.server.surfaces.openai.responses_bodies import ResponseBody, conversation, offer
from qnext.server.surfaces.opening import open_answers
from qnext.server.surfaces.sampling import AnswerOptions
from qnext.server.surfaces.writing import answered

_LOGPROBS = "message.output_text.logprobs"


async def responses(exchange: Exchange) -> HttpResponse | EventStream:
    body: ResponseBody = exchange.body
    try:
        return await _answered(exchange, body)
    except ApiError as error:
        if not body.stream or error.code != "context_length_exceeded":
            raise
        # Codex compacts when a stream says so, and gives up where the status does.
        exchange.outcome.stream = True
        exchange.outcome.error_code = error.code
        return EventStream(_refusal(exchange, body, error))


async def _refusal(exchange: Exchange, body: ResponseBody, error: ApiError) -> AsyncGenerator[bytes, None]:
    writer = ResponseWriter(exchange, AnswerReader(exchange.server.served), _echo(body))
    yield writer.frames(writer.refuse(error))


async def _answered(exchange: Exchange, body: ResponseBody) -> HttpResponse | EventStream:
    _refuse_kept(body)
    exchange.server.check_model(exchange, body.model)
    dialogue = await make_dialogue(exchange, await _chat_input(exchange, body))
    wants_logprobs = bool(body.top_logprobs) or _LOGPROBS in (body.include or ())
    wanted = SamplingBody(temperature=body.temperature, top_p=body.top_p)
    logprobs = (body.top_logprobs or 0) if wants_logprobs else None
    options = AnswerOptions(max_tokens=body.max_output_tokens, logprobs=logprobs, param="input")
    opening = await open_answers(exchange, dialogue, wanted, options)
    echo = await exchange.aside(lambda: _echo(body, opening.params))
    (answer,) = opening.answers
    writer = ResponseWriter(exchange, answer, echo, num_top=logprobs, origins=dialogue.chat.offer.origins)
    return await answered(exchange, opening.source, writer, streams=bool(body.stream))


def _refuse_kept(body: ResponseBody) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise ApiError.bad("this server keeps no responses", param=name, code="unsupported_parameter")
    if body.background:
        raise ApiError.bad("this server keeps no responses", param="background", code="unsupported_parameter")


async def _chat_input(exchange: Exchange, body: ResponseBody) -> ChatInput:
    messages, tools = await exchange.aside(lambda: (conversation(body, exchange.ignore), offer(body, exchange.ignore)))
    return ChatInput(
        messages,
        tools,
        constraint=_constraint(body),
        parallel_calls=body.parallel_tool_calls is not False,
        asked=body.asked(effort=body.reasoning.effort if body.reasoning is not None else None),
        param="input",
    )


def _constraint(body: ResponseBody) -> tuple[Constraint, str] | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Constraint("json_object"), "text.format"
    if wanted.schema_ is None:
        raise ApiError.bad("a format of type json_schema needs a schema", param="text.format.schema")
    return Constraint("json_schema", wanted.schema_, is_strict=bool(wanted.strict)), "text.format.schema"


def _echo(body: ResponseBody, params: SamplingParams | None = None) -> dict[str, Any]:
    """What a response says of its request."""
    wanted = body.text.format if body.text is not None else None
    text: dict[str, Any] = {"format": {"type": "text"}}
    if wanted is not None:
        text["format"] = wanted.model_dump(by_alias=True, exclude_none=True)
    if body.text is not None and body.text.verbosity is not None:
        text["verbosity"] = body.text.verbosity
    return {
        "created_at": int(time.time()),
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature if params is None else params.temperature,
        "text": text,
        "tool_choice": body.tool_choice if body.tool_choice is not None else "auto",
        "tools": [tool.model_dump(exclude_none=tool.type != "function") for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p if params is None else params.top_p,
        "truncation": "disabled",
    }
