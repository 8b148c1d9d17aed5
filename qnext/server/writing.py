"""Answers as named events, for the surfaces whose whole answer and stream are two views of the same events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import orjson

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.generation import Generation, Update

Event = dict[str, Any]  # with its name under "type"


class Writer(Protocol):
    """Writes one answer. What it returns goes into the stream; what the whole answer needs it keeps."""

    ping: bytes  # the frame of a silent stretch

    def begin(self, generation: Generation) -> list[Event]: ...

    def take(self, update: Update, generation: Generation) -> list[Event]: ...

    def end(self, generation: Generation) -> list[Event]: ...

    def fail(self, error: ApiError) -> list[Event]: ...


def event_frames(events: list[Event]) -> bytes:
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)


async def write_whole(generating: AbstractAsyncContextManager[Generation], writer: Writer) -> None:
    """Until the writer holds the whole answer."""
    async with generating as generation:
        writer.begin(generation)
        async for updates in generation.updates():
            for update in updates:
                writer.take(update, generation)
        writer.end(generation)


async def write_stream(
    exchange: Exchange, generating: AbstractAsyncContextManager[Generation], writer: Writer
) -> AsyncGenerator[bytes, None]:
    """The frames of a stream. What fails before the first of them is raised: it has an HTTP status of its own."""
    has_begun = False
    try:
        async with generating as generation:
            async for updates in generation.updates():
                frames = b"" if has_begun else event_frames(writer.begin(generation))
                has_begun = True
                for update in updates:
                    frames += event_frames(writer.take(update, generation))
                if frames or not updates:
                    yield frames or writer.ping
            yield event_frames(writer.end(generation))
    except ApiError as error:
        if not exchange.is_replying:
            raise
        exchange.outcome.error_code = error.code
        yield event_frames(writer.fail(error))
