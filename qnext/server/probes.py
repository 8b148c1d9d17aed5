"""What supervisors, monitors and the page ask: health, metrics, the live view, static files, the OpenAPI document."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import AsyncGenerator, Sequence
from functools import cache
from pathlib import Path

import orjson

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.live import TooManyViewers
from qnext.server.metrics import CONTENT_TYPE
from qnext.server.openapi import document
from qnext.server.routes import EventStream, Handler, Reply, Route

_PAGE = Path(__file__).with_name("page")
# Nothing from elsewhere, no script or style but ours; what a model writes cannot run.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


async def health_live(exchange: Exchange) -> Reply:
    """The event loop answers and the engine has not failed: a supervisor need not restart the server."""
    fault = exchange.server.fault
    return Reply.of({"status": "ok" if fault is None else fault}, status=200 if fault is None else 503)


async def health_ready(exchange: Exchange) -> Reply:
    """Loaded and not draining; what is lost meanwhile stands beside it. Where the server is told so, it answers without
    a key."""
    server = exchange.server
    if server.is_ready:
        return Reply.of({"status": "ready"} | ({"degraded": server.losses} if server.losses else {}))
    retry = {"Retry-After": str(server.limits.retry_seconds)}
    return Reply.of({"status": server.fault or server.state}, status=503, headers=retry)


async def health(exchange: Exchange) -> Reply:
    """As other servers have it: 200 where requests are answered, and nothing, or a line for each loss."""
    server = exchange.server
    if server.is_ready:
        return Reply("".join(f"degraded: {loss}\n" for loss in server.losses).encode(), content_type="text/plain")
    retry = {"Retry-After": str(server.limits.retry_seconds)}
    return Reply(b"", status=503, content_type="text/plain", headers=retry)


async def metrics(exchange: Exchange) -> Reply:
    return Reply(exchange.server.render_metrics(), content_type=CONTENT_TYPE)


async def live_model(exchange: Exchange) -> Reply:
    return Reply(exchange.server.live.model(key_id=_own_key(exchange)))


async def live_stream(exchange: Exchange) -> EventStream:
    return EventStream(_ticks(exchange))


def _own_key(exchange: Exchange) -> str | None:
    """Whose requests alone may be seen; None where it is everything."""
    return None if exchange.server.sees_all(exchange.key) else exchange.owner


async def _ticks(exchange: Exchange) -> AsyncGenerator[bytes, None]:
    try:
        async with exchange.server.live.watch(key_id=_own_key(exchange)) as ticks:
            async for tick in ticks:
                yield b"data: " + tick + b"\n\n"
    except TooManyViewers:
        raise ApiError.busy("too many viewers", retry_after=10.0) from None


@cache
def page_files() -> dict[str, Reply]:
    """Path under /page/ to the answer. All are read at once: no path of a request ever reaches the disk."""
    files: dict[str, Reply] = {}
    for path in sorted(_PAGE.rglob("*")):
        if not path.is_file() or path.name.startswith((".", "_")) or path.suffix == ".py":
            continue
        content = path.read_bytes()
        kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0]
        tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        text = "; charset=utf-8" if (kind or "").startswith("text/") else ""
        files[path.relative_to(_PAGE).as_posix()] = Reply(
            content, content_type=f"{kind or 'application/octet-stream'}{text}", headers={**_PAGE_HEADERS, "ETag": tag}
        )
    return files


async def page_index(exchange: Exchange) -> Reply:
    return _static(exchange, "index.html")


async def page_file(exchange: Exchange) -> Reply:
    return _static(exchange, exchange.path_params["name"])


def _static(exchange: Exchange, name: str) -> Reply:
    reply = page_files().get(name)
    if reply is None:
        raise ApiError(404, "no such file", code="not_found")
    if exchange.headers.get("if-none-match") == reply.headers["ETag"]:
        return Reply(b"", status=304, content_type=reply.content_type, headers=reply.headers)
    return reply


def openapi_handler(routes: Sequence[Route]) -> Handler:
    """Answers with the document of these routes, made when it is first asked for."""
    made: list[bytes] = []

    async def openapi(exchange: Exchange) -> Reply:
        if not made:
            made.append(orjson.dumps(document(routes)))
        return Reply(made[0])

    return openapi
