"""The ASGI application of a listener: its routes behind the guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from qnext.server.access.hosts import AllowedHosts
from qnext.server.errors import ApiError, error_body, style_of
from qnext.server.http.endpoint import Endpoint
from qnext.server.http.guard import Guard
from qnext.server.requests import Visit
from qnext.server.routes import Route
from qnext.server.server import Server


def make_application(server: Server, routes: Sequence[Route], *, bound: str | None = "127.0.0.1") -> Guard:
    """An ASGI application of the routes, for a listener bound to the address `bound`; None is a Unix socket.

    Raises UsageError for an allowed host that is no name.
    """
    table = [StarletteRoute(route.path, Endpoint(server, route), methods=[route.method]) for route in routes]
    for entry, route in zip(table, routes, strict=True):
        if route.limit == "generation" and entry.methods is not None:
            entry.methods.discard("HEAD")  # an answer without an end has no head to ask for alone

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        fault = ApiError(404, "no such route", code="not_found")
        if error.status_code == 405:
            fault = ApiError(405, "this route has other methods", code="method_not_allowed")
        visit: Visit = request.scope["state"]["visit"]
        visit.error_code = fault.code
        visit.route = next((entry.path for entry in table if entry.path_regex.match(request.scope["path"])), None)
        return _response(fault, request, error.headers)

    async def fail(request: Request, error: Exception) -> Response:
        fault = ApiError.internal()
        request.scope["state"]["visit"].error_code = fault.code
        return _response(fault, request, fault.headers)

    application = Starlette(routes=table, exception_handlers={404: refuse, 405: refuse, Exception: fail})
    application.router.redirect_slashes = False
    return Guard(application, server, AllowedHosts(bound, server.allowed_hosts))


def _response(fault: ApiError, request: Request, headers: Mapping[str, str] | None) -> Response:
    body = error_body(fault, style_of(request.scope["path"]))
    return Response(body, status_code=fault.status, headers=headers, media_type="application/json")
