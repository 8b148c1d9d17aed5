"""Where a replica takes calls from the ingress without Ray's own transport. No torch, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

from qnext.replicas.call import AskReplica, RoutedCall
from qnext.replicas.wire import END, FAILED, REFUSED, TOKEN_BYTES, piece_bytes, read_call

_log = logging.getLogger("qnext.replicas")


class Door:
    """A port at which whoever knows its token calls `answer`. It belongs to the event loop that opens it."""

    def __init__(self, answer: AskReplica) -> None:
        self._answer = answer
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._ended: dict[int, asyncio.Event] = {}  # of the calls that run, by their numbers
        self._connections: set[asyncio.Task[None]] = set()
        self._is_closing = False

    async def open(self, host: str) -> None:
        self._server = await asyncio.start_server(self._connected, host, 0)
        port = int(self._server.sockets[0].getsockname()[1])
        # Where and with what one calls here: a document of JSON.
        self.address: dict[str, Any] = {"host": host, "port": port, "token": self._token.hex()}

    async def ended(self, number: int) -> None:
        """Return when the call with this number has ended, at once where there is none."""
        if (event := self._ended.get(number)) is not None:
            await event.wait()

    async def close(self, seconds: float) -> None:
        """Take no more calls. Those that run have so many seconds to end."""
        self._is_closing = True
        self._server.close()
        waits = [asyncio.ensure_future(event.wait()) for event in self._ended.values()]
        if waits:
            await asyncio.wait(waits, timeout=seconds)
        for task in [*waits, *self._connections]:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                if hmac.compare_digest(await reader.readexactly(TOKEN_BYTES), self._token):
                    await self._serve(reader, writer)
        except asyncio.CancelledError:  # the replica ends
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call after another. Raises IncompleteReadError when the other side has left, also amid an answer."""
        reading = asyncio.ensure_future(read_call(reader))
        try:
            while True:
                number, call = await reading
                reading = asyncio.ensure_future(read_call(reader))  # of which nothing comes before the answer's end
                if self._is_closing:
                    writer.write(REFUSED)
                    continue
                await self._run(number, self._write_answer(call, writer), reading)
        finally:
            reading.cancel()
            await asyncio.wait((reading,))

    async def _run(self, number: int, answer: Coroutine[Any, Any, None], reading: asyncio.Future[Any]) -> None:
        """An answer, until it ends or `reading` fails."""
        self._ended[number] = asyncio.Event()
        answering = asyncio.ensure_future(answer)
        try:
            await asyncio.wait((answering, reading), return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and reading.exception() is None:
                await answering
        finally:
            answering.cancel()
            await asyncio.wait((answering,))
            self._ended.pop(number).set()

    async def _write_answer(self, call: RoutedCall, writer: asyncio.StreamWriter) -> None:
        last = END
        try:
            async with contextlib.aclosing(self._answer(call)) as pieces:
                async for piece in pieces:
                    writer.write(piece_bytes(piece))
                    await writer.drain()
        except ConnectionError:
            return
        except Exception:
            _log.exception("a call failed")
            last = FAILED
        writer.write(last)
