"""What a client sends behind the head of its request: the body, in bounds, and at last that it has left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from qnext.server.errors import ApiError
from qnext.server.requests import AsgiMessage

Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]


class ClientGone(Exception):
    """The connection closed before the body was there."""


def check_length(headers: Mapping[str, str], limit: int) -> None:
    """Raises ApiError where the head announces a body of more bytes."""
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)


async def read_all(receive: Receive, limit: int, take: Callable[[int], None]) -> bytes:
    """The body. `take` is told of the bytes of each message before they are kept, and may raise. Raises ApiError beyond
    the limit, ClientGone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        take(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
