"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import orjson

from qnext.engine.sampling.constraint import Constraint
from qnext.server.body.strict import SamplingBody
from qnext.server.errors import ApiError, error_object
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Update
from qnext.server.routes import EventStream, HttpResponse
from qnext.server.surfaces.answers import usage_counts
from qnext.server.surfaces.anthropic.bodies import CountBody, MessagesBody
from qnext.server.surfaces.anthropic.conversation import conversation
from qnext.server.surfaces.anthropic.tools import offer
from qnext.server.surfaces.dialogue import ChatInput, make_dialogue
from qnext.server.surfaces.held import ReadAnswer
from qnext.server.surfaces.opening import open_answers
from qnext.server.surfaces.sampling import AnswerOptions
from qnext.server.surfaces.source import Source
from qnext.server.surfaces.writing import Event, answered, named_frames
from qnext.text.output import CallArguments, CallCut, CallEnd, CallStart, Content, OutputEvent, Reasoning, whole_members

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
BlockKind = Literal["text", "thinking"]


async def messages(exchange: Exchange) -> HttpResponse | EventStream:
    body: MessagesBody = exchange.body
    chat = await _chat_input(exchange, body, stop=tuple(body.stop_sequences or ()))
    dialogue = await make_dialogue(exchange, chat)
    wanted = SamplingBody(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    opening = await open_answers(exchange, dialogue, wanted, AnswerOptions(max_tokens=body.max_tokens))
    (answer,) = opening.answers
    return await answered(exchange, opening.source, MessageWriter(exchange, answer), streams=bool(body.stream))


async def count_tokens(exchange: Exchange) -> HttpResponse:
    """The number of tokens that the prompt of this body has."""
    dialogue = await make_dialogue(exchange, await _chat_input(exchange, exchange.body), is_prompt=False)
    return HttpResponse.of({"input_tokens": len(dialogue.prompt_ids)})


async def _chat_input(exchange: Exchange, body: CountBody, *, stop: tuple[str, ...] = ()) -> ChatInput:
    exchange.server.check_model(exchange, body.model)
    choice, config = body.tool_choice, body.output_config
    turns, tools = await exchange.aside(lambda: (conversation(body, exchange.ignore), offer(body, exchange.ignore)))
    return ChatInput(
        turns,
        tools,
        constraint=_constraint(body),
        stop=stop,
        parallel_calls=choice is None or not choice.disable_parallel_tool_use,
        asked=body.asked(
            thinks=body.thinking.is_wanted if body.thinking is not None else None,
            effort=config.effort if config is not None else None,
            budget=body.thinking.budget_tokens if body.thinking is not None else None,
        ),
        continues=body.messages[-1].role == "assistant",
    )


def _constraint(body: CountBody) -> tuple[Constraint, str] | None:
    config = body.output_config
    if config is not None and config.format is not None:
        return Constraint("json_schema", config.format.schema_), "output_config.format.schema"
    if body.output_format is not None:
        return Constraint("json_schema", body.output_format.schema_), "output_format.schema"
    return None


class MessageWriter:
    """An answer as content blocks: thought, text and calls, in the order in which they come."""

    frames = staticmethod(named_frames)

    def __init__(self, exchange: Exchange, answer: ReadAnswer) -> None:
        self.exchange = exchange
        self.answer = answer
        self.id = f"msg_{secrets.token_hex(12)}"
        self.blocks: list[dict[str, Any]] = []
        self._kind: BlockKind | None = None  # of the block that is open
        self._texts: list[str] = []  # its pieces
        self._usage: dict[str, Any] = {}

    def document(self) -> dict[str, Any]:
        """The message as far as it is written."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.exchange.model_name,
            "content": [dict(block) for block in self.blocks],
            "usage": dict(self._usage),
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
        }

    def begin(self, source: Source) -> list[Event]:
        self._count(source)
        return [{"type": "message_start", "message": self.document()}, self.ping()]

    def ping(self) -> Event:
        return {"type": "ping"}

    def take(self, update: Update, source: Source) -> list[Event]:
        return self.write(self.answer.take(update, source))

    def write(self, events: list[OutputEvent]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if not isinstance(event, (Content, Reasoning)):
                found += self._call(event)
                continue
            kind: BlockKind = "text" if isinstance(event, Content) else "thinking"
            if kind != self._kind:
                found += self._close() + self._open(kind)
            self._texts.append(event.text)
            found.append(self._delta({"type": f"{kind}_delta", kind: event.text}))
        return found

    def end(self, source: Source) -> list[Event]:
        self._count(source)
        self.exchange.outcome.finish_reason = self.answer.end_reason
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return [
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": self._usage},
            {"type": "message_stop"},
        ]

    def fail(self, error: ApiError) -> list[Event]:
        return [error_object(error, "anthropic")]

    @property
    def _stop_sequence(self) -> str | None:
        return self.answer.stop_string if self.answer.end_reason == "stop" else None

    @property
    def _stop_reason(self) -> str | None:
        if self.answer.end_reason is None:
            return None
        return "stop_sequence" if self._stop_sequence is not None else _REASONS[self.answer.end_reason]

    def _count(self, source: Source) -> None:
        prompt, cached, generated, reasoning = usage_counts(source.of_prompts[0], [self.answer])
        self._usage = {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
            "output_tokens_details": {"thinking_tokens": reasoning},
        }

    def _start(self, block: dict[str, Any]) -> Event:
        return {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _stop(self) -> Event:
        return {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _open(self, kind: BlockKind) -> list[Event]:
        self._kind = kind
        self.blocks.append({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        return [self._start(self.blocks[-1])]

    def _close(self) -> list[Event]:
        kind, self._kind = self._kind, None
        if kind is None:
            return []
        self.blocks[-1][kind] = "".join(self._texts)
        self._texts.clear()
        signed = [self._delta({"type": "signature_delta", "signature": ""})] if kind == "thinking" else []
        return [*signed, self._stop()]

    def _call(self, event: CallStart | CallArguments | CallEnd | CallCut) -> list[Event]:
        if isinstance(event, CallStart):
            closed = self._close()
            self.blocks.append(
                {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": event.name, "input": {}}
            )
            return [*closed, self._start(self.blocks[-1])]
        if isinstance(event, CallArguments):
            self._texts.append(event.text)
            return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
        arguments = "".join(self._texts)
        self._texts.clear()
        # As the model wrote it: reading and writing it again could change numbers.
        self.blocks[-1]["input"] = orjson.Fragment(
            arguments if isinstance(event, CallEnd) else whole_members(arguments)
        )
        return [self._stop()]
