"""The routes of a server, called in memory: the same answers as over HTTP, without a listener."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import httpx2

from qnext.errors import QnextError

if TYPE_CHECKING:
    from qnext.engine import Engine
    from qnext.server.inference.served import ServedModel
    from qnext.server.server import Server

Ask = Callable[[str, bytes], Awaitable[httpx2.Response]]  # path, JSON

_WATCH_SECONDS = 0.25
_LAST_SECONDS = 10.0  # for answers that are under way when the engine has failed
_NO_BOUND = 1 << 30  # of requests that wait


@contextlib.asynccontextmanager
async def ask_in_process(
    engine: Engine, served: ServedModel, *, request_seconds: float, max_body_bytes: int
) -> AsyncIterator[Ask]:
    """A server in this process for one caller. All its requests may wait in the queue.

    After a fault of the engine, every request that has no answer raises QnextError. An answer that came before counts.
    """
    from qnext.server.http.application import make_application
    from qnext.server.limits import Limits
    from qnext.server.server import Server
    from qnext.server.table import public_routes

    limits = Limits(
        max_queued=_NO_BOUND,
        max_queued_per_key=_NO_BOUND,
        queue_seconds=math.inf,
        request_seconds=request_seconds,
        max_body_bytes=max_body_bytes,
    )
    server = Server(limits=limits, with_page=False)
    server.attach(engine, served)
    transport = httpx2.ASGITransport(app=make_application(server, public_routes(with_page=False)))
    watching = asyncio.create_task(_watch(server))
    headers = {"Content-Type": "application/json"}
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:

            async def ask(path: str, content: bytes) -> httpx2.Response:
                fault = watching.result() if watching.done() else server.fault
                if fault is not None:
                    raise QnextError(fault)
                posting = asyncio.ensure_future(client.post(path, content=content, headers=headers))
                try:
                    await asyncio.wait((posting, watching), return_when=asyncio.FIRST_COMPLETED)
                    # A broken engine has refused what it had; one that hangs says nothing.
                    await asyncio.wait((posting,), timeout=_LAST_SECONDS)
                    if not posting.done():
                        raise QnextError(watching.result())
                    return posting.result()
                finally:
                    posting.cancel()

            yield ask
    finally:
        watching.cancel()
        if server.fault is None:  # else its thread may never end; it ends with the process
            await server.drain(0.0)
        server.close()


async def _watch(server: Server) -> str:
    """Until the engine does not work any more; the fault."""
    while (fault := server.fault) is None:
        await asyncio.sleep(_WATCH_SECONDS)
    return fault
