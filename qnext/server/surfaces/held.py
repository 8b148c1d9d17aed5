"""Answers that are held back until the operator's moderation has judged them, and prompts that are judged first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

from qnext.engine.policy.request import SampledToken
from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Update
from qnext.server.moderation.judgement import TextJudgement
from qnext.server.surfaces.answers import AnswerReader, CountedAnswer, EndReason
from qnext.server.surfaces.source import Source
from qnext.text.messages import Message, ToolCall
from qnext.text.output import CallArguments, CallCut, CallEnd, CallStart, Content, OutputEvent, Reasoning

PIECE = 240  # characters that are judged at once while an answer is streamed
TAIL = 48  # of them that stay until the next piece is judged: what begins in one piece may end in the next
_PREVIOUS = 2_000  # characters of what was sent, that the hook is told
_KINDS = {Content: "content", Reasoning: "reasoning", CallArguments: "tool_call"}
_HeldText = Content | Reasoning | CallArguments


class ReadAnswer(CountedAnswer, Protocol):
    """What a writer asks of the answer that it writes: an AnswerReader, or one that is held back."""

    tokens: list[SampledToken]

    @property
    def end_reason(self) -> EndReason | None: ...

    @property
    def is_reasoning(self) -> bool: ...

    @property
    def stop_string(self) -> str | None: ...

    def take(self, update: Update, source: Source) -> list[OutputEvent]: ...


class HeldAnswer:
    """An answer whose writer sees only what was judged. The gate reads tokens into it and releases their events.

    It has no tokens: their log-probabilities would tell what is held back.
    """

    def __init__(self, reader: AnswerReader) -> None:
        self.tokens: list[SampledToken] = []
        self.end_reason: EndReason | None = None
        self._reader = reader
        self._held: list[OutputEvent] = []
        self._judged: list[OutputEvent] = []  # of which the question is
        self._ready: list[OutputEvent] = []
        self._end: EndReason | None = None  # that the writer will see
        self._sent = ""

    @property
    def num_generated(self) -> int:
        return self._reader.num_generated

    @property
    def num_reasoning(self) -> int:
        return self._reader.num_reasoning

    @property
    def is_reasoning(self) -> bool:
        return self._reader.is_reasoning

    @property
    def stop_string(self) -> str | None:
        return self._reader.stop_string if self.end_reason == "stop" else None

    @property
    def previous(self) -> str:
        return self._sent

    def take(self, update: Update, source: Source) -> list[OutputEvent]:
        """What was released since the last call."""
        ready, self._ready = self._ready, []
        self.end_reason = self._end
        return ready

    # ---- what the gate does ----

    @property
    def has_ended(self) -> bool:
        """Whether all of it is released, or it is blocked."""
        return self._end is not None

    @property
    def is_whole(self) -> bool:
        return self._reader.end_reason is not None

    def read(self, update: Update, source: Source) -> None:
        if self._end is None:
            self._held += self._reader.take(update, source)

    def question(self, *, in_pieces: bool) -> list[_HeldText] | None:
        """What is to be judged next, neighbours of one kind joined; None where there is nothing yet, and [] at an end
        that has no text."""
        if self._end is not None or not (self.is_whole or in_pieces):
            return None
        num_events = len(self._held) if self.is_whole else _closed(self._held)
        texts = _joined(self._held[:num_events])
        if not self.is_whole and sum(len(each.text) for each in texts) < PIECE:
            return None
        self._judged, self._held = self._held[:num_events], self._held[num_events:]
        return texts

    def release(self, judgement: TextJudgement | None, *, is_last: bool, source: Source, index: int) -> None:
        """Let what was judged through as the judgement says; None lets it pass."""
        judged, self._judged = self._judged, []
        if judgement is not None and judgement.action == "block":
            if not self.is_whole:
                source.stop(index)
            self._held, self._end = [], "content_filter"
            return
        if judgement is not None and judgement.action == "redact":
            judged = _replaced(judged, judgement.texts)
        elif not is_last:
            judged, tail = _cut(judged)
            self._held = tail + self._held
        self._ready += judged
        self._sent = (self._sent + "".join(e.text for e in judged if isinstance(e, _HeldText)))[-_PREVIOUS:]
        if is_last:
            self._end = self._reader.end_reason


def held(
    exchange: Exchange, readers: Sequence[AnswerReader], opening: AbstractAsyncContextManager[Source]
) -> tuple[list[ReadAnswer], AbstractAsyncContextManager[Source]]:
    """The answers for a writer, and their source. Without moderation they are what was given."""
    if exchange.server.moderator is None:
        return list(readers), opening
    answers = [HeldAnswer(reader) for reader in readers]
    return list(answers), _gated(exchange, answers, opening)


@asynccontextmanager
async def _gated(
    exchange: Exchange, answers: Sequence[HeldAnswer], opening: AbstractAsyncContextManager[Source]
) -> AsyncIterator[Source]:
    async with opening as source:
        gate = _Gate(exchange, answers, source)
        try:
            yield replace(source, updates=gate.updates)
        finally:
            await gate.close()


class _Gate:
    """Reads on while pieces are judged, one of each answer at a time. So a slow hook gets larger pieces."""

    def __init__(self, exchange: Exchange, answers: Sequence[HeldAnswer], source: Source) -> None:
        self._exchange = exchange
        self._answers = answers
        self._source = source
        self._judging: dict[asyncio.Future[TextJudgement | None], tuple[int, bool]] = {}
        self._next: asyncio.Future[list[Update] | None] | None = None

    async def updates(self) -> AsyncIterator[list[Update]]:
        """An update for each answer that something was released of; [] after a long silence."""
        feed = self._source.updates()
        self._next = asyncio.ensure_future(_next_of(feed))
        while self._next is not None or self._judging:
            await asyncio.wait(
                self._jobs(), timeout=self._source.silence.seconds_left, return_when=asyncio.FIRST_COMPLETED
            )
            released = [self._release(job) for job in list(self._judging) if job.done()]
            is_silent = False
            if self._next is not None and self._next.done():
                updates = self._next.result()
                is_silent = updates == []
                for update in updates or ():
                    self._answers[update.index].read(update, self._source)
                self._next = None if updates is None else asyncio.ensure_future(_next_of(feed))
            released += self._ask()
            if released:
                yield [Update(index, None, None) for index in released]
            elif is_silent or self._source.silence.is_long:
                yield []

    def _ask(self) -> list[int]:
        """Have the next pieces judged. Returns the answers that end without any text left."""
        busy, ended = {index for index, _ in self._judging.values()}, []
        for index, answer in enumerate(self._answers):
            texts = None if index in busy else answer.question(in_pieces=self._exchange.outcome.stream)
            if texts is None:
                continue
            is_last = answer.is_whole
            if not texts:
                answer.release(None, is_last=is_last, source=self._source, index=index)
                ended.append(index)
                continue
            kinds = [_KINDS[type(each)] for each in texts]
            judge = self._exchange.judge(
                "answer", [each.text for each in texts], kinds, previous=answer.previous, is_last=is_last
            )
            self._judging[asyncio.ensure_future(judge)] = index, is_last
        return ended

    def _release(self, job: asyncio.Future[TextJudgement | None]) -> int:
        index, is_last = self._judging.pop(job)
        self._answers[index].release(job.result(), is_last=is_last, source=self._source, index=index)
        return index

    def _jobs(self) -> list[asyncio.Future[Any]]:
        return [*self._judging, *([] if self._next is None else [self._next])]

    async def close(self) -> None:
        for job in self._jobs():
            job.cancel()
        for job in self._jobs():
            with suppress(asyncio.CancelledError, Exception):
                await job


async def _next_of(feed: AsyncIterator[list[Update]]) -> list[Update] | None:
    return await anext(feed, None)


def _closed(events: Sequence[OutputEvent]) -> int:
    """How many events come before a call that is still being written: a call is judged whole."""
    for place in range(len(events) - 1, -1, -1):
        if isinstance(events[place], (CallEnd, CallCut)):
            break
        if isinstance(events[place], CallStart):
            return place
    return len(events)


def _joined(events: Sequence[OutputEvent]) -> list[_HeldText]:
    """The texts of events; neighbours of one kind are one, and each call has its own."""
    found: list[_HeldText] = []
    is_new = True
    for event in events:
        if not isinstance(event, _HeldText):
            is_new = True
        elif not is_new and type(found[-1]) is type(event):
            found[-1] = found[-1]._replace(text=found[-1].text + event.text)
        else:
            found.append(event)
            is_new = False
    return found


def _replaced(events: Sequence[OutputEvent], texts: Sequence[str]) -> list[OutputEvent]:
    """The events with the texts of `_joined` replaced, one by one."""
    found: list[OutputEvent] = []
    left = iter(texts)
    last: type | None = None
    for event in events:
        if not isinstance(event, _HeldText):
            found.append(event)
            last = None
        elif type(event) is not last:
            last = type(event)
            found.append(event._replace(text=next(left)))
    return found


def _cut(events: list[OutputEvent]) -> tuple[list[OutputEvent], list[OutputEvent]]:
    """What goes, and the last characters of a text, which stay. They begin behind a space where there is one near."""
    kind = type(events[-1]) if events else None
    if kind not in (Content, Reasoning):
        return events, []
    first = len(events)
    while first and type(events[first - 1]) is kind:
        first -= 1
    text = "".join(event.text for event in events[first:] if isinstance(event, (Content, Reasoning)))
    place = max(0, len(text) - TAIL)
    place = max(text.rfind(" ", 0, place), text.rfind("\n", 0, place)) + 1 or place
    made = Content if kind is Content else Reasoning
    going = [made(text[:place])] if place else []
    return [*events[:first], *going], [made(text[place:])]


async def judged_texts(exchange: Exchange, texts: Sequence[str], kinds: Sequence[str], *, param: str) -> Sequence[str]:
    """The texts of a prompt as the moderation lets them through. Raises ApiError 400 where it does not."""
    if exchange.server.moderator is None or not any(texts):
        return texts
    judgement = await exchange.judge("prompt", texts, kinds)
    if judgement is None or judgement.action in ("allow", "flag"):
        return texts
    if judgement.action == "block":
        message = "the prompt is refused by the moderation of this server"
        raise ApiError.bad(message, param=param, code="content_filter")
    return judgement.texts


async def judged_messages(exchange: Exchange, messages: Sequence[Message], *, param: str) -> Sequence[Message]:
    """The same for a conversation: contents, thoughts, and the arguments of calls."""
    if exchange.server.moderator is None:
        return messages
    parts = [part for message in messages for part in _parts(message)]
    said = [(text, kind) for text, kind in parts if text]
    judged = iter(await judged_texts(exchange, [text for text, _ in said], [kind for _, kind in said], param=param))
    texts = iter([next(judged) if text else "" for text, _ in parts])
    return [_with_texts(message, texts) for message in messages]


def _parts(message: Message) -> list[tuple[str, str]]:
    calls = [(_arguments(call), "tool_call") for call in message.tool_calls]
    return [(message.content, message.role), (message.reasoning_content or "", "reasoning"), *calls]


def _with_texts(message: Message, texts: Iterator[str]) -> Message:
    """The message with the texts of `_parts`; what is as it was stays the same object."""
    content, thought = next(texts), next(texts)
    if thought != (message.reasoning_content or ""):
        message = replace(message, reasoning_content=thought)
    calls = [(call, next(texts)) for call in message.tool_calls]
    changed = tuple(call if text == _arguments(call) else replace(call, arguments=text) for call, text in calls)
    return replace(message, content=content, tool_calls=changed)


def _arguments(call: ToolCall) -> str:
    given = call.arguments
    return given if isinstance(given, str) else json.dumps(dict(given), ensure_ascii=False)
