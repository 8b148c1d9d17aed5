"""Answers as events: the whole answer and the stream of every surface are two views of the same ones."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.generation import Silence, Update
from qnext.server.long_json import whole_json

_log = logging.getLogger("qnext.server")
Event = dict[str, Any]
Later = Callable[[], Event]  # an event that takes a while to make; those of a list are made in order
_FEW = 8  # events that are written in the event loop
SomeSource = TypeVar("SomeSource", bound="Source")
WrittenSource = TypeVar("WrittenSource", bound="Source", contravariant=True)


class Writer(Protocol[WrittenSource]):
    """Writes one answer. What it returns goes into the stream; what the whole answer needs it keeps."""

    def begin(self, generation: WrittenSource) -> list[Event]: ...

    def take(self, update: Update, generation: WrittenSource) -> Sequence[Event | Later]: ...

    def ping(self) -> Event:
        """What keeps a silent stream open: an event, since clients count those and no comments."""
        ...

    def end(self, generation: WrittenSource) -> list[Event]: ...

    def fail(self, error: ApiError) -> list[Event]: ...

    def frames(self, events: list[Event], *, is_last: bool = False) -> bytes:
        """The events as they are sent."""
        ...


class Source(Protocol):
    """Where the updates of an answer, or of several, come from."""

    silence: Silence

    def updates(self) -> AsyncIterator[list[Update]]: ...

    def stop(self, index: int) -> None: ...


def named_frames(events: list[Event], *, is_last: bool = False) -> bytes:
    """Events with their names, which stand under "type"."""
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), whole_json(event)) for event in events)


def data_frames(events: list[Event], *, is_last: bool = False) -> bytes:
    """Events without names, and the mark of the end."""
    frames = b"".join(b"data: %s\n\n" % whole_json(event) for event in events)
    return frames + b"data: [DONE]\n\n" if is_last else frames


async def write_whole(generating: AbstractAsyncContextManager[SomeSource], writer: Writer[SomeSource]) -> SomeSource:
    """Until the writer holds the whole answer."""
    async with generating as generation:
        writer.begin(generation)
        async for updates in generation.updates():
            for update in updates:
                writer.take(update, generation)
        writer.end(generation)
    return generation


async def write_stream(
    exchange: Exchange, generating: AbstractAsyncContextManager[SomeSource], writer: Writer[SomeSource]
) -> AsyncGenerator[bytes, None]:
    """The frames of a stream, never silent for long: tokens of which nothing can be sent yet are silence too.

    What fails before the first frame is raised: it has an HTTP status of its own.
    """
    has_begun = False
    try:
        async with generating as generation:
            async for updates in generation.updates():
                events: list[Event | Later] = []
                if not has_begun:
                    has_begun = True
                    events += writer.begin(generation)
                    if exchange.is_long:  # they may repeat the request
                        async for frames in _framed(exchange, writer, events, few=0):
                            yield frames
                        events = []
                for update in updates:
                    events += writer.take(update, generation)
                if not events and (not updates or generation.silence.is_long):
                    events = [writer.ping()]
                async for frames in _framed(exchange, writer, events):
                    yield frames
                    generation.silence.end()
            last = writer.end(generation)
            if exchange.is_long:  # they may repeat the answer
                async for frames in _framed(exchange, writer, last, few=0):
                    yield frames
                last = []
            yield writer.frames(last, is_last=True)
    except Exception as error:
        if not exchange.is_replying:
            raise
        if not isinstance(error, ApiError):
            _log.exception("request %s failed in its stream", exchange.request_id)
        refusal = error if isinstance(error, ApiError) else ApiError.internal()
        exchange.outcome.error_code = refusal.code
        yield writer.frames(writer.fail(refusal), is_last=True)


async def _framed(
    exchange: Exchange, writer: Writer[SomeSource], events: Sequence[Event | Later], *, few: int = _FEW
) -> AsyncGenerator[bytes, None]:
    """The frames of events: of a few at once, of many one by one in a thread."""
    if len(events) <= few:
        if events:
            yield writer.frames(list(map(_made, events)))
        return
    for event in events:
        yield await exchange.server.writing.run(exchange.payer, functools.partial(_frame, writer, event))


def _frame(writer: Writer[SomeSource], event: Event | Later) -> bytes:
    return writer.frames([_made(event)])


def _made(event: Event | Later) -> Event:
    return event() if callable(event) else event
