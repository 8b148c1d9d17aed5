"""One server in a replica of Ray Serve: the model is opened once, and the routes are called in memory."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray.util
from ray import serve

from qnext.replicas.call import AnswerHead, RoutedCall
from qnext.replicas.direct import Hold
from qnext.replicas.door import Door
from qnext.server.expert_watch import keep_watching
from qnext.server.http.application import make_application
from qnext.server.run import LoadModel, look_after, prepare_process
from qnext.server.server import Server
from qnext.server.table import public_routes

# From the name of a replica's files to a server and its model.
OpenServer = Callable[[str], tuple[Server, LoadModel]]
REPLICA_HEADER = b"x-qnext-replica"

_log = logging.getLogger("qnext.replicas")
_LEAVE_SECONDS = 5.0  # for a request to note that its client has left
_ANYWHERE = "0.0.0.0"  # Ray Serve's proxy listens, wherever it is told to


class Replica:
    """Answers calls of the ingress as `qnext serve` answers requests. It belongs to the event loop that opens it."""

    async def open(self, open_server: OpenServer) -> None:
        """Load the model and begin to answer. Raises what the loading raises; Ray Serve tries again, three times."""
        prepare_process()
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._server, load = await asyncio.to_thread(open_server, f"replica-{context.rank.rank}")
        server = self._server
        routes = public_routes(with_page=server.with_page, open_readiness=server.open_readiness)
        self._application = make_application(server, routes, bound=_ANYWHERE)
        self._tasks = look_after(server)
        engine, served = await asyncio.to_thread(load)
        server.attach(engine, served)
        self._door = Door(self)
        await self._door.open(ray.util.get_node_ip_address())
        if server.expert_watch is not None:
            self._tasks.append(asyncio.create_task(keep_watching(server.expert_watch, lambda: engine.expert_counts(0))))
        gc.freeze()

    async def __call__(self, call: RoutedCall) -> AsyncGenerator[AnswerHead | bytes, None]:
        """The pieces of the answer. Closing the generator is the client's leaving."""
        answer = _AsgiAnswer(call.body, self._name)
        running = asyncio.create_task(answer.run(self._application, dict(call.scope)))
        try:
            while (piece := await answer.next_piece()) is not None:
                yield piece
            running.result()
        finally:
            answer.has_left.set()
            if not running.done():
                await asyncio.wait((running,), timeout=_LEAVE_SECONDS)
                running.cancel()

    async def whole(self, call: RoutedCall) -> tuple[str, AnswerHead]:
        """The name of this replica, and an answer in one piece."""
        pieces = [piece async for piece in self(call)]
        begin = pieces[0]
        assert isinstance(begin, AnswerHead)
        body = b"".join(piece for piece in pieces[1:] if isinstance(piece, bytes))
        return self._name, begin._replace(body=begin.body + body, is_whole=True)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Ray Serve tells it to every ingress."""
        return self._door.address

    async def hold(self, hold: Hold) -> None:
        """Runs as long as a call at the door does, so that Ray Serve counts it."""
        await self._door.ended(hold.number)

    async def check_health(self) -> None:
        """Raises where Ray Serve should start this replica anew. A file of keys that has changed is read again."""
        problem = self._server.keys.reload_if_changed()
        if problem is not None:
            _log.warning("keys not reloaded: %s", problem)
        if self._server.fault is not None:
            raise RuntimeError(self._server.fault)

    async def close(self) -> None:
        """End it, when its requests have ended or their time has."""
        if not hasattr(self, "_tasks"):  # it was never open
            return
        if hasattr(self, "_door"):
            await self._door.close(self._server.limits.drain_seconds)
        await self._server.drain(0.0)
        for task in self._tasks:
            task.cancel()
        self._server.close()


class _AsgiAnswer:
    """One request as ASGI sees it, and the pieces of its answer."""

    def __init__(self, body: bytes, replica: str) -> None:
        self.has_left = asyncio.Event()
        self._body: bytes | None = body
        self._added = [(REPLICA_HEADER, replica.encode())]
        self._start: dict[str, Any] | None = None
        self._pieces: asyncio.Queue[AnswerHead | bytes | None] = asyncio.Queue()

    async def run(self, application: Callable[..., Any], scope: dict[str, Any]) -> None:
        try:
            await application(scope, self._receive, self._send)
        finally:
            self._pieces.put_nowait(None)

    async def next_piece(self) -> AnswerHead | bytes | None:
        """The next piece; of bytes all that have come. None at the end."""
        piece = await self._pieces.get()
        if isinstance(piece, bytes):
            parts = [piece]
            while not self._pieces.empty():
                more = self._pieces.get_nowait()
                if not isinstance(more, bytes):
                    self._pieces.put_nowait(more)
                    break
                parts.append(more)
            return b"".join(parts)
        return piece

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        start, self._start = self._start, None
        if start is not None:
            headers = [*start["headers"], *self._added]
            self._pieces.put_nowait(AnswerHead(start["status"], headers, body, is_last))
        elif body:
            self._pieces.put_nowait(body)
