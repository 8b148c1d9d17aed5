"""From tokens to what surfaces send: text, reasoning, calls, log-probabilities, counts, and the reason of the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson

from qnext.engine.policy.request import Request, SampledToken
from qnext.server.long_json import LongList
from qnext.text.output import CallEnd, CallStart, Content, OutputEvent, OutputParser
from qnext.text.stream import TextStream, Thought

if TYPE_CHECKING:
    from qnext.server.inference.generation import Generation, Update
    from qnext.server.inference.served import ServedModel
    from qnext.server.surfaces.source import Source

EndReason = Literal["stop", "length", "tool_calls", "content_filter"]
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class CountedAnswer(Protocol):
    """How many tokens an answer has, those of its thought among them."""

    @property
    def num_generated(self) -> int: ...

    @property
    def num_reasoning(self) -> int: ...


class AnswerReader:
    """Reads one answer token by token. `stop_string` and `end_reason` are set when the answer has ended.

    Without a `parser` all text is content. Stop strings are not searched in the `thought`. The answer ends after
    `max_calls` calls. An answer that ends inside a call has the end reason "length".
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        stop: Sequence[str] = (),
        parser: OutputParser | None = None,
        starts_in_reasoning: bool = False,
        thought: Thought | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._stream = TextStream(served.tokenizer, stop=stop, thought=thought)
        self._parser = parser
        self._max_calls = max_calls
        self._is_reasoning = starts_in_reasoning
        self.tokens: list[SampledToken] = []  # the one that ended it too, which is no text
        self.num_generated = 0
        self.num_reasoning = 0
        self.num_calls = 0
        self.end_reason: EndReason | None = None

    @property
    def is_reasoning(self) -> bool:
        """Whether only the thought has come so far."""
        return self._is_reasoning

    @property
    def stop_string(self) -> str | None:
        return self._stream.stop_string

    def take(self, update: Update, source: Source) -> list[OutputEvent]:
        """The events of one more token, or of the end. Stops the answer in the source where it is complete."""
        if self.end_reason is not None:
            return []
        events: list[OutputEvent] = []
        if update.token is not None:
            self.num_generated += 1
            self.tokens.append(update.token)
            was_in_thought = self._is_in_thought
            if update.finish_reason != "stop":
                events += self._parse(self._stream.push(update.token.token_id))
            self.num_reasoning += was_in_thought or self._is_in_thought
        if self.stop_string is not None or self._is_full:
            if update.finish_reason is None:
                source.stop(update.index)
            return self._end("stop", events, has_ended=False)
        if update.finish_reason is not None:
            is_cut = update.finish_reason == "length"
            return self._end("length" if is_cut else "stop", events, has_ended=not is_cut)
        return events

    @property
    def _is_in_thought(self) -> bool:
        return self._is_reasoning if self._parser is None else self._parser.is_in_thought

    @property
    def _is_full(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def _end(self, reason: EndReason, events: list[OutputEvent], *, has_ended: bool) -> list[OutputEvent]:
        if not self._is_full:
            events += self._parse(self._stream.finish())
            if self._parser is not None:
                events += self._noted(self._parser.finish(has_ended=has_ended))
        if self._parser is not None and self._parser.has_cut_call:
            reason = "length"
        self.end_reason = "tool_calls" if self.num_calls and reason == "stop" else reason
        return events

    def _parse(self, text: str) -> list[OutputEvent]:
        if not text:
            return []
        return self._noted([Content(text)] if self._parser is None else self._parser.push(text))

    def _noted(self, events: list[OutputEvent]) -> list[OutputEvent]:
        kept: list[OutputEvent] = []
        for event in events:
            if self._is_full:
                break
            self.num_calls += isinstance(event, CallEnd)
            self._is_reasoning = self._is_reasoning and not isinstance(event, (CallStart, Content))
            kept.append(event)
        return kept


def usage_counts(generation: Generation, answers: Sequence[CountedAnswer]) -> tuple[int, int, int, int]:
    """(prompt tokens, cached ones of them, generated tokens, reasoning ones of them) of a generation."""
    cached = min((request.num_cached_tokens or 0 for request in generation.requests), default=0)
    generated = sum(answer.num_generated for answer in answers)
    return len(generation.prompt_ids), cached, generated, sum(answer.num_reasoning for answer in answers)


def timings(request: Request) -> dict[str, Any]:
    """The times of a request in milliseconds, and rates in tokens per second; null for phases that did not happen."""
    times = request.times
    num_prompt, num_output = len(request.prompt_ids), len(request.output_ids)

    def milliseconds(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else round(1000 * (end - begin), 3)

    prompt_ms = milliseconds(times.scheduled, times.first_token)
    decode_ms = milliseconds(times.first_token, times.last_token)
    computed = num_prompt - (request.num_cached_tokens or 0)
    return {
        "queue_ms": milliseconds(times.arrived, times.scheduled),
        "prompt_ms": prompt_ms,
        "decode_ms": decode_ms,
        "prompt_tokens_per_second": round(1000 * computed / prompt_ms, 2) if prompt_ms else None,
        "tokens_per_second": round(1000 * (num_output - 1) / decode_ms, 2) if decode_ms and num_output > 1 else None,
        "cached_tokens": request.num_cached_tokens or 0,
        "drafted": request.num_drafted,
        "accepted": request.num_accepted,
    }


def finite_logprob(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST_LOGPROB)


def token_name(served: ServedModel, token_id: int, *, as_id: bool) -> str:
    """The text of a token, or with `as_id` (return_tokens_as_token_ids) a name that no other token has."""
    return f"token_id:{token_id}" if as_id else served.token_text(token_id)


def chat_logprob(served: ServedModel, token: SampledToken, num_top: int, *, as_id: bool = False) -> dict[str, Any]:
    """OpenAI's form of a token of a chat answer."""
    entry = _named(served, token.token_id, token.logprob, as_id)
    entry["top_logprobs"] = [_named(served, other, value, as_id) for other, value in token.top_logprobs[:num_top]]
    return entry


def chat_logprobs(
    served: ServedModel, tokens: Sequence[SampledToken], num_top: int, *, as_id: bool = False
) -> LongList:
    """OpenAI's form of the tokens of a chat answer."""

    def some(begin: int, end: int) -> list[dict[str, Any]]:
        return [chat_logprob(served, token, num_top, as_id=as_id) for token in tokens[begin:end]]

    return LongList(len(tokens), some, width=8 * (num_top + 1))


def prompt_logprobs(served: ServedModel, tokens: Sequence[SampledToken]) -> LongList:
    """The tokens of a prompt in vLLM's form: each with its alternatives by id; null for the first token, which has
    none."""

    def some(begin: int, end: int) -> list[orjson.Fragment | None]:
        return [_ranked(served, token) for token in tokens[begin:end]]

    return LongList(len(tokens), some, width=2 * max((len(token.top_logprobs) + 1 for token in tokens[:2]), default=1))


def _ranked(served: ServedModel, token: SampledToken) -> orjson.Fragment | None:
    """The JSON of a token and its alternatives. Objects of Python would take five times as long."""
    if token.logprob is None:
        return None
    ranked = {other: (value, rank) for rank, (other, value) in enumerate(token.top_logprobs, 1)}
    ranked.setdefault(token.token_id, (token.logprob, token.rank or 0))
    entries = (
        f'"{other}":{{"logprob":{finite_logprob(value)!r},"rank":{rank},"decoded_token":{served.token_json(other)}}}'
        for other, (value, rank) in ranked.items()
    )
    return orjson.Fragment("{" + ",".join(entries) + "}")


def _named(served: ServedModel, token_id: int, logprob: float | None, as_id: bool) -> dict[str, Any]:
    return {
        "token": token_name(served, token_id, as_id=as_id),
        "logprob": finite_logprob(logprob),
        "bytes": list(served.token_bytes(token_id)),
    }
