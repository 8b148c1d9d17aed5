"""Handlers for supervisors, monitors and the page: health, metrics, the live view, static files, the OpenAPI
document."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import orjson

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.metrics import CONTENT_TYPE
from qnext.server.openapi import document
from qnext.server.routes import EventStream, Handler, HttpResponse, Route
from qnext.server.view.files import page_files
from qnext.server.view.live import TooManyViewers


async def health_live(exchange: Exchange) -> HttpResponse:
    """200 while the engine has not failed: a supervisor need not restart the server."""
    fault = exchange.server.fault
    return HttpResponse.of({"status": "ok" if fault is None else fault}, status=200 if fault is None else 503)


async def health_ready(exchange: Exchange) -> HttpResponse:
    """200 where the model is loaded and the server does not drain, with the server's losses; else 503. It may need no
    key."""
    server = exchange.server
    if server.is_ready:
        return HttpResponse.of({"status": "ready"} | ({"degraded": server.losses} if server.losses else {}))
    retry = {"Retry-After": str(server.limits.retry_seconds)}
    return HttpResponse.of({"status": server.fault or server.state}, status=503, headers=retry)


async def health(exchange: Exchange) -> HttpResponse:
    """The health check of other servers: 200 where requests are answered, with an empty body or one line for each
    loss."""
    server = exchange.server
    if server.is_ready:
        return HttpResponse(
            "".join(f"degraded: {loss}\n" for loss in server.losses).encode(), content_type="text/plain"
        )
    retry = {"Retry-After": str(server.limits.retry_seconds)}
    return HttpResponse(b"", status=503, content_type="text/plain", headers=retry)


async def metrics(exchange: Exchange) -> HttpResponse:
    return HttpResponse(exchange.server.render_metrics(), content_type=CONTENT_TYPE)


async def live_model(exchange: Exchange) -> HttpResponse:
    return HttpResponse(exchange.server.live.model(key_id=_own_key(exchange)))


async def live_stream(exchange: Exchange) -> EventStream:
    return EventStream(_ticks(exchange))


def _own_key(exchange: Exchange) -> str | None:
    """The key whose requests alone may be seen; None where all may be."""
    return None if exchange.server.sees_all(exchange.key) else exchange.owner


async def _ticks(exchange: Exchange) -> AsyncGenerator[bytes, None]:
    try:
        async with exchange.server.live.watch(key_id=_own_key(exchange)) as ticks:
            async for tick in ticks:
                yield b"data: " + tick + b"\n\n"
    except TooManyViewers:
        raise ApiError.busy("too many viewers", retry_after=10.0) from None


async def page_index(exchange: Exchange) -> HttpResponse:
    return _static(exchange, "index.html")


async def page_file(exchange: Exchange) -> HttpResponse:
    return _static(exchange, exchange.path_params["name"])


def _static(exchange: Exchange, name: str) -> HttpResponse:
    reply = page_files().get(name)
    if reply is None:
        raise ApiError(404, "no such file", code="not_found")
    if exchange.headers.get("if-none-match") == reply.headers["ETag"]:
        return HttpResponse(b"", status=304, content_type=reply.content_type, headers=reply.headers)
    return reply


def openapi_handler(routes: Sequence[Route]) -> Handler:
    """A handler that answers with the document of these routes. The document is made at the first request."""
    made: list[bytes] = []

    async def openapi(exchange: Exchange) -> HttpResponse:
        if not made:
            made.append(orjson.dumps(document(routes)))
        return HttpResponse(made[0])

    return openapi
