"""What every request and every answer passes, whatever the route: sizes of headers, a request id, safe headers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qnext.server.errors import ApiError, error_body, style_of
from qnext.server.limits import Limits

Message = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9, -]{1,1000}")
_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """Refuses what no route should see, and puts an X-Request-Id and safe headers on every answer.

    `origins` may read answers from other origins' pages; no other page may.
    """

    def __init__(self, application: Application, limits: Limits, *, origins: frozenset[str] = frozenset()) -> None:
        self.application = application
        self.limits = limits
        self.origins = origins

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = scope["headers"]
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        added = [(b"x-request-id", request_id), *_SAFE_HEADERS, *self._cors(headers)]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        error = _version_fault(scope) or self._fault(headers) or _path_fault(scope)
        if error is not None:
            await _send_error(send_with_headers, error, scope["path"])
        elif scope["method"] == "OPTIONS" and len(added) > len(_SAFE_HEADERS) + 1:
            await send_with_headers({"type": "http.response.start", "status": 204, "headers": []})
            await send_with_headers({"type": "http.response.body", "body": b""})
        else:
            await self.application(scope, receive, send_with_headers)

    def _fault(self, headers: list[tuple[bytes, bytes]]) -> ApiError | None:
        limits = self.limits
        if len(headers) > limits.max_headers or sum(len(n) + len(v) for n, v in headers) > limits.max_header_bytes:
            return ApiError(431, "the headers are too large", code="headers_too_large", headers={"Connection": "close"})
        names = [name for name, _ in headers]
        lengths = [value for name, value in headers if name == b"content-length"]
        if b"transfer-encoding" in names and lengths:
            return _smuggled("Content-Length and Transfer-Encoding exclude each other")
        if len(lengths) > 1 or names.count(b"host") > 1:
            return _smuggled("more than one Content-Length or Host")
        if b"content-encoding" in names:
            return ApiError(415, "compressed bodies are not accepted", code="unsupported_media_type")
        return None

    def _cors(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        origin = next((value for name, value in headers if name == b"origin"), None)
        if origin is None or origin.decode("latin-1") not in self.origins:
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"vary", b"Origin"),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (
                b"access-control-allow-headers",
                b"authorization, content-type, x-api-key, anthropic-version, x-request-id",
            ),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
        ]


def _asked_headers(headers: list[tuple[bytes, bytes]]) -> bytes:
    """What the page wants to send: the libraries of clients have headers of their own."""
    asked = next((value for name, value in headers if name == b"access-control-request-headers"), b"")
    return asked if _HEADER_NAMES.fullmatch(asked) else b"authorization, content-type, x-api-key"


def _version_fault(scope: Message) -> ApiError | None:
    if scope["http_version"] in ("1.0", "1.1"):
        return None
    return ApiError(505, "this server speaks HTTP/1.1", code="invalid_request", headers={"Connection": "close"})


def _smuggled(message: str) -> ApiError:
    """Of what follows nobody knows whether it is a body or the next request."""
    return ApiError(400, message, code="invalid_request", headers={"Connection": "close"})


def _path_fault(scope: Message) -> ApiError | None:
    path = scope["path"]
    if len(path) > 2_048 or any(ord(c) < 32 or c == "\x7f" for c in path):
        return ApiError(404, "no such route", code="not_found")
    return None


def _request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()


async def _send_error(send: Any, error: ApiError, path: str) -> None:
    body = error_body(error, style_of(path))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
