"""A route as an ASGI application: key, rates, body, handler, answer, error and audit line, in one order for all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from pydantic import BaseModel

from qnext.server.body.foreign_fields import review
from qnext.server.body.parsing import is_small, parse_body
from qnext.server.errors import ApiError, error_body
from qnext.server.exchange import Exchange
from qnext.server.http.reading import ClientGone, Receive, Send, check_length, disconnected, read_all
from qnext.server.requests import NO_ANSWER, AsgiMessage, Visit
from qnext.server.routes import EventStream, HttpResponse, Route
from qnext.server.server import Server

_log = logging.getLogger("qnext.server")


class Endpoint:
    """Answers the requests of one route."""

    def __init__(self, server: Server, route: Route) -> None:
        self.server = server
        self.route = route

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        exchange = _exchange(self.server, self.route, scope)
        self.server.active.add(exchange)
        started = time.perf_counter()
        try:
            await self._answer(exchange, receive, send)
        except ApiError as error:
            await self._refuse(exchange, send, error)
        except ClientGone:
            exchange.outcome.status, exchange.outcome.error_code = NO_ANSWER, "client_disconnected"
            self._count_abort(exchange, "body")
        except Exception:
            _log.exception("request %s to %s failed", exchange.request_id, self.route.path)
            await self._refuse(exchange, send, ApiError.internal())
        finally:
            self.server.bodies.give_back(exchange.payer, exchange.num_held)
            if "forced" in scope["state"]:  # what the connection has answered by itself
                forced: Visit = scope["state"]["forced"]
                exchange.request_id = forced.request_id
                exchange.outcome.status, exchange.outcome.error_code = forced.status, forced.error_code
                self.server.counters.count_rejection(forced.error_code or "")
            visit: Visit = scope["state"]["visit"]
            exchange.outcome.error_code = exchange.outcome.error_code or visit.error_code
            visit.is_booked = True
            self.server.active.discard(exchange)
            self.server.book(exchange, time.perf_counter() - started)

    async def _answer(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        exchange.key = self.server.authorize(exchange)
        self.server.check_running(self.route)
        if self.route.limit not in ("generation", "work"):
            await _send_reply(exchange, send, await self.route.handler(exchange))
            return
        if self.route.limit == "work":
            with self.server.admission(exchange, 0):
                await self._answer_with_body(exchange, receive, send)
            return
        if self.route.body is not None:
            self.server.check_rates(exchange)  # nothing is read, parsed or tokenized for a request that comes too soon
        await self._answer_with_body(exchange, receive, send)

    async def _answer_with_body(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        """What may take long: it ends when the client leaves."""
        if self.route.body is not None:
            exchange.body = await self._read_body(exchange, receive, self.route.body)
        work = asyncio.ensure_future(self._work(exchange, send))
        gone = asyncio.ensure_future(disconnected(receive))
        exchange.server.tasks[exchange] = work
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((work,))
            if work.done() and not work.cancelled():
                work.exception()  # looked at here, for where this task is cancelled nobody asks again
            del exchange.server.tasks[exchange]
        if not work.cancelled():
            work.result()
        elif exchange.outcome.error_code is None:
            exchange.outcome.error_code = "client_disconnected"
            self._count_abort(exchange, "before queue")
            exchange.outcome.status = exchange.outcome.status or NO_ANSWER
        elif not exchange.is_replying:  # ended by the server, which says why
            raise ApiError(503, "the server ended this request", code=exchange.outcome.error_code)

    def _count_abort(self, exchange: Exchange, phase: str) -> None:
        """Where no generation has done so."""
        if exchange.outcome.abort_phase is None and not exchange.is_replying:
            exchange.outcome.abort_phase = phase
            self.server.counters.count_abort(phase)

    async def _work(self, exchange: Exchange, send: Send) -> None:
        await _send_reply(exchange, send, await self.route.handler(exchange))

    async def _read_body(self, exchange: Exchange, receive: Receive, model: type[BaseModel]) -> BaseModel:
        kind = exchange.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
        limits = self.server.limits
        check_length(exchange.headers, limits.max_body_bytes)

        def take(num_bytes: int) -> None:
            self.server.bodies.take(exchange.payer, num_bytes)
            exchange.num_held += num_bytes

        try:
            raw = await asyncio.wait_for(read_all(receive, limits.max_body_bytes, take), limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
        exchange.is_small = is_small(raw)
        if exchange.is_small:
            body = parse_body(raw, model)
        else:
            body = await self.server.parsing.run(exchange.payer, lambda: parse_body(raw, model))
        review(self.route.path, body, exchange.ignore)
        return body

    async def _refuse(self, exchange: Exchange, send: Send, error: ApiError) -> None:
        """Answer with an error. A stream that has begun has reported it itself, and only ends here."""
        exchange.outcome.error_code = error.code
        if exchange.is_replying:
            return
        self.server.counters.count_rejection(error.code or str(error.status))
        body = error_body(error, self.route.errors)
        await _send_reply(exchange, send, HttpResponse(body, status=error.status, headers=error.headers))


async def _send_reply(exchange: Exchange, send: Send, reply: HttpResponse | EventStream) -> None:
    if isinstance(reply, HttpResponse) and reply.parts is not None:
        parts, writing = reply.parts, exchange.server.writing
        await _send_start(exchange, send, reply.status, reply.content_type, reply.headers)
        while part := await writing.run(exchange.payer, lambda: next(parts, b"")):
            await _send(exchange, send, {"type": "http.response.body", "body": part, "more_body": True})
        await _send(exchange, send, {"type": "http.response.body", "body": b""})
        return
    if isinstance(reply, HttpResponse):
        await _send_start(exchange, send, reply.status, reply.content_type, reply.headers, length=len(reply.body))
        await _send(exchange, send, {"type": "http.response.body", "body": reply.body})
        return
    async with contextlib.aclosing(reply.frames) as frames:
        # The first frame decides the status: what is refused before any token has an HTTP status of its own.
        first = await anext(frames, b"")
        headers = {**reply.headers, "X-Accel-Buffering": "no"}
        await _send_start(exchange, send, 200, "text/event-stream; charset=utf-8", headers)
        await _send(exchange, send, {"type": "http.response.body", "body": first, "more_body": True})
        async for frame in frames:
            await _send(exchange, send, {"type": "http.response.body", "body": frame, "more_body": True})
        await _send(exchange, send, {"type": "http.response.body", "body": b""})


async def _send_start(
    exchange: Exchange, send: Send, status: int, content_type: str, more: Any, *, length: int | None = None
) -> None:
    exchange.outcome.status = status
    headers = {"Content-Type": content_type, "Cache-Control": "no-store", **exchange.reply_headers, **more}
    if length is not None:
        headers["Content-Length"] = str(length)
    exchange.is_replying = True
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await _send(exchange, send, {"type": "http.response.start", "status": status, "headers": raw})


async def _send(exchange: Exchange, send: Send, message: AsgiMessage) -> None:
    """Send a message, and note since when it waits for the client: the server's janitor ends those who do not read."""
    exchange.write_began = time.monotonic()
    await send(message)
    exchange.write_began = None
    exchange.rest(is_parked=False)


def _exchange(server: Server, route: Route, scope: AsgiMessage) -> Exchange:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    client = scope.get("client")
    request_id = scope["state"]["visit"].request_id
    return Exchange(
        server=server,
        route=route,
        request_id=request_id,
        headers=headers,
        path_params=scope.get("path_params", {}),
        client=client[0] if client else "",
        # Anthropic's clients read the id under this name.
        reply_headers={"Request-Id": request_id} if route.errors == "anthropic" else {},
    )
