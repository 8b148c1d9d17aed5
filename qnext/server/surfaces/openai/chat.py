"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from qnext.errors import QnextError
from qnext.server.errors import ApiError, error_object, from_user_error
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Generation, Update
from qnext.server.long_json import LongList
from qnext.server.routes import EventStream, HttpResponse
from qnext.server.surfaces.answers import (
    chat_logprob,
    chat_logprobs,
    prompt_logprobs,
    timings,
    usage_counts,
)
from qnext.server.surfaces.dialogue import ChatInput, make_dialogue
from qnext.server.surfaces.held import ReadAnswer
from qnext.server.surfaces.openai.chat_bodies import ChatBody, conversation, offer_of, response_constraint
from qnext.server.surfaces.opening import open_answers
from qnext.server.surfaces.sampling import AnswerOptions, stop_strings
from qnext.server.surfaces.source import Source
from qnext.server.surfaces.tools import Offer, Origin, free_input
from qnext.server.surfaces.writing import Event, answered, data_frames
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


async def chat_completions(exchange: Exchange) -> HttpResponse | EventStream:
    body: ChatBody = exchange.body
    exchange.server.check_model(exchange, body.model)
    offer = await exchange.aside(lambda: offer_of(body, exchange.ignore))
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError.bad("continue_final_message excludes add_generation_prompt", param="continue_final_message")
    try:
        dialogue = await make_dialogue(exchange, await _chat_input(exchange, body, offer))
    except QnextError as error:
        raise from_user_error(error, param="messages") from None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError.bad("top_logprobs needs logprobs", param="top_logprobs")
    options = AnswerOptions(
        max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    opening = await open_answers(exchange, dialogue, body, options)
    writer = ChatWriter(exchange, body, offer, opening.answers)
    return await answered(exchange, opening.source, writer, streams=bool(body.stream))


async def _chat_input(exchange: Exchange, body: ChatBody, offer: Offer) -> ChatInput:
    return ChatInput(
        await exchange.aside(lambda: conversation(body.messages, exchange.ignore)),
        offer,
        constraint=response_constraint(body),
        parallel_calls=body.parallel_tool_calls is not False and not body.functions,
        stop=stop_strings(body),
        stops_in_thought=bool(body.stop_in_reasoning),
        asked=body.template_request(),
        continues=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
    )


class ChatWriter:
    """One chat completion while it is written: the chunks of a stream, or the choices of a whole answer."""

    def __init__(self, exchange: Exchange, body: ChatBody, offer: Offer, answers: list[ReadAnswer]) -> None:
        self.exchange = exchange
        self.body = body
        self.offer = offer
        self.answers = answers
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._events: list[list[OutputEvent]] = [[] for _ in answers]  # of a whole completion
        self._num_logged = [0] * len(answers)  # tokens whose log-probabilities are sent
        self._generation: Generation | None = None
        self._num_calls = [0] * len(answers)  # that have begun
        self._inputs: list[list[str] | None] = [None] * len(answers)  # pieces of a custom tool's arguments

    frames = staticmethod(data_frames)

    def document(self) -> dict[str, Any]:
        generation = self.generation
        choices = [self._choice(index, found) for index, found in enumerate(self._events)]
        if self.body.return_token_ids:
            for choice, request in zip(choices, generation.requests, strict=True):
                choice["token_ids"] = LongList.of_values(request.output_ids)
        document = {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
        if self.body.return_token_ids:
            document["prompt_token_ids"] = LongList.of_values(generation.prompt_ids)
        if self.body.prompt_logprobs is not None:
            sampled = generation.requests[0].prompt_sampled
            document["prompt_logprobs"] = prompt_logprobs(self.exchange.server.served, sampled)
        if self.body.timings:
            document["timings"] = timings(generation.requests[0])
        return document

    @property
    def generation(self) -> Generation:
        assert self._generation is not None, "nothing has begun"
        return self._generation

    def begin(self, source: Source) -> list[Event]:
        self._generation = source.of_prompts[0]
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self.answers))]

    def take(self, update: Update, source: Source) -> list[Event]:
        answer = self.answers[update.index]
        was_open = answer.end_reason is None
        events = answer.take(update, source)
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

    def end(self, source: Source) -> list[Event]:
        self.exchange.outcome.finish_reason = self.answers[0].end_reason
        document: dict[str, Any] = {**self._head("chat.completion.chunk"), "choices": []}
        if self._has_usage:
            document["usage"] = self._usage()
        if self.body.timings:
            document["timings"] = timings(self.generation.requests[0])
        return [document] if self._has_usage or self.body.timings else []

    def fail(self, error: ApiError) -> list[Event]:
        return [error_object(error, "openai")]

    def _head(self, kind: str) -> dict[str, Any]:
        name, fingerprint = self.exchange.model_name, self.exchange.system_fingerprint
        head = {"id": self.id, "object": kind, "created": self.created, "model": name}
        return head if fingerprint is None else {**head, "system_fingerprint": fingerprint}

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> Event:
        choice = {"index": index, "delta": delta, "finish_reason": None, **more}
        document = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._has_usage:
            document["usage"] = self._usage_so_far()
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
        """A piece of a call in the form of its tool. The input of a custom tool comes in one piece."""
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
        served, as_id = self.exchange.server.served, bool(self.body.return_tokens_as_token_ids)
        logged = chat_logprobs(served, self.answers[index].tokens, self.body.top_logprobs or 0, as_id=as_id)
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": logged} if self.body.logprobs else None,
            "finish_reason": self._reason(index),
        }

    def _reason(self, index: int) -> str | None:
        reason = self.answers[index].end_reason
        return "function_call" if reason == "tool_calls" and self.body.functions else reason

    def _usage_so_far(self) -> dict[str, Any] | None:
        options = self.body.stream_options
        is_wanted = options is not None and options.is_continuous
        return self._usage() if is_wanted else None

    def _usage(self) -> dict[str, Any]:
        return usage(*usage_counts(self.generation, self.answers))


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
