"""From updates to a surface's events. One loop and one writer make both the stream and the whole answer."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, NamedTuple, Protocol

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Update
from qnext.server.long_json import whole_json
from qnext.server.routes import EventStream, HttpResponse
from qnext.server.surfaces.source import Source

_log = logging.getLogger("qnext.server")
Event = dict[str, Any]
Later = Callable[[], Event]  # an event that takes a while to make; those of a list are made in order
_FEW = 8  # events that are written in the event loop


class Writer(Protocol):
    """Writes the answers of one request. It returns the events of the stream, and keeps what the whole answer needs."""

    def begin(self, source: Source) -> list[Event]: ...

    def take(self, update: Update, source: Source) -> Sequence[Event | Later]: ...

    def ping(self) -> Event:
        """What keeps a silent stream open. It is an event, because clients ignore comments in their timeouts."""
        ...

    def end(self, source: Source) -> list[Event]: ...

    def fail(self, error: ApiError) -> list[Event]: ...

    def frames(self, events: list[Event], *, is_last: bool = False) -> bytes:
        """The events in the form in which they are sent."""
        ...

    def document(self) -> dict[str, Any]:
        """The whole answer, once `end` has been called."""
        ...


def named_frames(events: list[Event], *, is_last: bool = False) -> bytes:
    """Events with names. The name is the value of "type"."""
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), whole_json(event)) for event in events)


def data_frames(events: list[Event], *, is_last: bool = False) -> bytes:
    """Events without names, and the mark of the end."""
    frames = b"".join(b"data: %s\n\n" % whole_json(event) for event in events)
    return frames + b"data: [DONE]\n\n" if is_last else frames


class _EventGroup(NamedTuple):
    """Events that came together. `repeats`: they may hold a long request or a long answer once more."""

    events: Sequence[Event | Later]
    is_silent: bool = False  # nothing was sent for long
    repeats: bool = False
    is_last: bool = False


async def answered(
    exchange: Exchange, opening: AbstractAsyncContextManager[Source], writer: Writer, *, streams: bool
) -> HttpResponse | EventStream:
    """What a surface's handler returns: a stream of the writer's events, or the writer's document when all is
    written."""
    if streams:
        exchange.outcome.stream = True
        return EventStream(write_stream(exchange, opening, writer))
    async with aclosing(_written(exchange, opening, writer)) as batches:
        async for _ in batches:
            pass
    return await exchange.written(lambda: HttpResponse.of(writer.document()))


async def _written(
    exchange: Exchange, opening: AbstractAsyncContextManager[Source], writer: Writer
) -> AsyncGenerator[_EventGroup, None]:
    """The one loop of all answers: run the generations to their end, and have the writer take all that comes."""
    async with opening as source:
        has_begun = False
        async for updates in source.updates():
            events: list[Event | Later] = []
            if not has_begun:
                has_begun = True
                events += writer.begin(source)
                if exchange.is_long:
                    yield _EventGroup(events, repeats=True)
                    events = []
            for update in updates:
                events += writer.take(update, source)
            is_silent = not updates or source.silence.is_long
            yield _EventGroup(events, is_silent)
            if events or is_silent:
                source.silence.end()
        yield _EventGroup(writer.end(source), repeats=exchange.is_long, is_last=True)


async def write_stream(
    exchange: Exchange, opening: AbstractAsyncContextManager[Source], writer: Writer
) -> AsyncGenerator[bytes, None]:
    """The frames of a stream, with a ping after a long silence. Tokens that cannot be sent yet count as silence too.

    An error before the first frame is raised, so that it gets its own HTTP status.
    """
    try:
        async with aclosing(_written(exchange, opening, writer)) as batches:
            async for batch in batches:
                events = batch.events or ([writer.ping()] if batch.is_silent else [])
                if batch.is_last and not batch.repeats:
                    yield writer.frames(list(map(_made, events)), is_last=True)
                    continue
                async for frames in _framed(exchange, writer, events, few=0 if batch.repeats else _FEW):
                    yield frames
                if batch.is_last:
                    yield writer.frames([], is_last=True)
    except Exception as error:
        if not exchange.is_replying:
            raise
        if not isinstance(error, ApiError):
            _log.exception("request %s failed in its stream", exchange.request_id)
        refusal = error if isinstance(error, ApiError) else ApiError.internal()
        exchange.outcome.error_code = refusal.code
        yield writer.frames(writer.fail(refusal), is_last=True)


async def _framed(
    exchange: Exchange, writer: Writer, events: Sequence[Event | Later], *, few: int = _FEW
) -> AsyncGenerator[bytes, None]:
    """The frames of events: of a few at once, of many one by one in a thread."""
    if len(events) <= few:
        if events:
            yield writer.frames(list(map(_made, events)))
        return
    for event in events:
        yield await exchange.server.writing.run(exchange.payer, functools.partial(_frame, writer, event))


def _frame(writer: Writer, event: Event | Later) -> bytes:
    return writer.frames([_made(event)])


def _made(event: Event | Later) -> Event:
    return event() if callable(event) else event
