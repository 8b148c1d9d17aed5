"""The checks that every request and every answer passes, whatever its route.

Host, origin and sizes of headers are checked. An answer gets a request id and safe headers. A request that no route has
answered gets its line in the audit log here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from qnext.server.access.hosts import AllowedHosts, Host, parse_host, same_origin
from qnext.server.errors import ApiError, error_body, style_of
from qnext.server.limits import Limits
from qnext.server.requests import NO_ANSWER, AsgiMessage, Visit

if TYPE_CHECKING:
    from qnext.server.server import Server

Application = Callable[..., Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_log = logging.getLogger("qnext.server")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9, -]{1,1000}")
_ABSOLUTE = re.compile(r"(?i:https?)://(?P<host>[^/]*)(?P<path>/.*)?")
SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """Refuses requests that no route should see, and adds X-Request-Id and safe headers to every answer.

    `hosts` are the names of this listener. Only pages of its own origin and of `server.origins` may call it. Requests
    that end here without a route are counted and have their line in the audit log.
    """

    def __init__(self, application: Application, server: Server, hosts: AllowedHosts) -> None:
        self.application = application
        self.server = server
        self.hosts = hosts

    async def __call__(self, scope: AsgiMessage, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        else:
            await self._visited(scope, receive, send, self._fault)

    async def refuse_full(self, scope: AsgiMessage, receive: Any, send: Any) -> None:
        """The application of a connection above `max_connections`. It refuses every request."""
        headers = {"Retry-After": "5", "Connection": "close"}
        fault = ApiError(503, "too many connections", code="overloaded", headers=headers)
        await self._visited(scope, receive, send, lambda _: fault)

    async def _visited(
        self, scope: AsgiMessage, receive: Any, send: Any, fault_of: Callable[[AsgiMessage], ApiError | None]
    ) -> None:
        headers: Headers = scope["headers"]
        client = scope.get("client")
        visit = Visit(client[0] if client else "", scope["method"], headers)
        given = _values(headers, b"x-request-id")
        if given and _REQUEST_ID.fullmatch(given[0]):
            visit.request_id = given[0].decode()
        scope.setdefault("state", {})["visit"] = visit
        cors = self._cors(headers)
        added = [(b"x-request-id", visit.request_id.encode()), *SAFE_HEADERS, *cors]

        async def send_with_headers(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            fault = fault_of(scope)
            if fault is not None:
                await _refuse(send_with_headers, fault, visit, scope["path"])
            elif scope["method"] == "OPTIONS" and cors:
                await send_with_headers({"type": "http.response.start", "status": 204, "headers": []})
                await send_with_headers({"type": "http.response.body", "body": b""})
            else:
                await self.application(scope, receive, send_with_headers)
        except Exception:
            _log.exception("request %s failed", visit.request_id)
            if not visit.status:
                await _refuse(send_with_headers, ApiError.internal(), visit, scope["path"])
        finally:
            if not visit.is_booked:
                self._book(visit, scope)

    def _book(self, visit: Visit, scope: AsgiMessage) -> None:
        if "forced" in scope["state"]:  # what the connection has answered by itself
            scope["state"]["forced"].overrule(visit)
        elif not visit.status:
            visit.status, visit.error_code = NO_ANSWER, "client_disconnected"
        self.server.book_visit(visit)

    def _fault(self, scope: AsgiMessage) -> ApiError | None:
        headers = scope["headers"]
        return (
            _version_fault(scope)
            or self._header_fault(headers)
            or self._host_fault(scope)
            or _path_fault(scope)
            or self._origin_fault(scope)
        )

    def _header_fault(self, headers: Headers) -> ApiError | None:
        limits: Limits = self.server.limits
        if len(headers) > limits.max_headers or sum(len(n) + len(v) for n, v in headers) > limits.max_header_bytes:
            return ApiError(431, "the headers are too large", code="headers_too_large", headers={"Connection": "close"})
        lengths = _values(headers, b"content-length")
        if lengths and _values(headers, b"transfer-encoding"):
            return _smuggled("Content-Length and Transfer-Encoding exclude each other")
        if len(lengths) > 1 or len(_values(headers, b"host")) > 1:
            return _smuggled("more than one Content-Length or Host")
        if _values(headers, b"content-encoding"):
            return ApiError(415, "compressed bodies are not accepted", code="unsupported_media_type")
        return None

    def _host_fault(self, scope: AsgiMessage) -> ApiError | None:
        """Checks Host, and the host of a target that is a whole URL; of such a target only the path is kept."""
        names = _values(scope["headers"], b"host")
        if not names and scope["http_version"] == "1.0":
            return None  # older than Host, and than every browser
        asked = [name.decode("latin-1") for name in names]
        target = _ABSOLUTE.fullmatch(scope.get("raw_path", b"").decode("latin-1"))
        if target is not None:
            asked.append(target["host"])
            scope["path"] = scope["path"].partition("://")[2].partition("/")[2]
            scope["path"], scope["raw_path"] = f"/{scope['path']}", (target["path"] or "/").encode("latin-1")
        for text in asked or [""]:
            host = parse_host(text)
            if host is None:
                return _smuggled("no Host, or one that cannot be read")
            if not self.hosts.allows(host, needs_key=not self.server.keys.is_open):
                message = "this server has another name; --allowed-hosts gives it more"
                return ApiError(421, message, code="host_not_allowed", headers={"Connection": "close"})
        return None

    def _origin_fault(self, scope: AsgiMessage) -> ApiError | None:
        """Refuses a page of another origin, which browsers name in Origin, or at least in Sec-Fetch-Site."""
        headers = scope["headers"]
        origins, sites = _values(headers, b"origin"), _values(headers, b"sec-fetch-site")
        if origins:
            is_foreign = len(origins) > 1 or not self._may_call(origins[0].decode("latin-1"), headers)
        else:
            # A link leads here from anywhere; it reads nothing and changes nothing.
            is_link = scope["method"] in ("GET", "HEAD") and _values(headers, b"sec-fetch-mode") == [b"navigate"]
            is_foreign = not is_link and any(site in (b"cross-site", b"same-site") for site in sites)
        if not is_foreign:
            return None
        return ApiError(
            403, "pages of other origins may not call; --allowed-origins lets them", code="origin_not_allowed"
        )

    def _may_call(self, origin: str, headers: Headers) -> bool:
        hosts = _values(headers, b"host")
        host: Host | None = parse_host(hosts[0].decode("latin-1")) if hosts else None
        return origin in self.server.origins or (host is not None and same_origin(origin.lower(), host))

    def _cors(self, headers: Headers) -> Headers:
        origins = _values(headers, b"origin")
        if len(origins) != 1 or origins[0].decode("latin-1") not in self.server.origins:
            return []
        return [
            (b"access-control-allow-origin", origins[0]),
            (b"vary", b"Origin"),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", _asked_headers(headers)),
            (b"access-control-expose-headers", b"x-request-id, x-system-fingerprint, retry-after"),
        ]


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _asked_headers(headers: Headers) -> bytes:
    """The headers that a page may send: those it asks for, since libraries of clients have their own."""
    asked = _values(headers, b"access-control-request-headers")
    if len(asked) == 1 and _HEADER_NAMES.fullmatch(asked[0]):
        return asked[0]
    return b"authorization, content-type, x-api-key, anthropic-version, x-request-id"


def _version_fault(scope: AsgiMessage) -> ApiError | None:
    if scope["http_version"] in ("1.0", "1.1"):
        return None
    return ApiError(505, "this server speaks HTTP/1.1", code="invalid_request", headers={"Connection": "close"})


def _smuggled(message: str) -> ApiError:
    """The connection is closed: what follows could be the body or the next request."""
    return ApiError(400, message, code="invalid_request", headers={"Connection": "close"})


def _path_fault(scope: AsgiMessage) -> ApiError | None:
    path = scope["path"]
    if len(path) > 2_048 or any(ord(c) < 32 or c == "\x7f" for c in path):
        return ApiError(404, "no such route", code="not_found")
    return None


async def _refuse(send: Any, error: ApiError, visit: Visit, path: str) -> None:
    visit.error_code = error.code
    body = error_body(error, style_of(path))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
