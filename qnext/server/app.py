"""The server as one object, and the applications of its two listeners. What it holds is found here, not in globals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from qnext.server.audit import AuditLog, AuditRecord
from qnext.server.endpoint import Endpoint
from qnext.server.errors import ApiError, error_body, style_of
from qnext.server.exchange import IGNORED_HEADER, Exchange
from qnext.server.guard import Guard
from qnext.server.hosts import AllowedHosts
from qnext.server.keys import Key, KeyRing
from qnext.server.lanes import Budget, Lane
from qnext.server.limits import MAX_HELD_BYTES, MAX_HELD_BYTES_PER_KEY, MAX_LARGE_WAITING, Limits
from qnext.server.live import LiveHub
from qnext.server.metrics import KNOWN_METHODS, ServerCounters, ServerMetrics
from qnext.server.own_work import OwnLedger
from qnext.server.rates import FailedLogins, KeyRates, Refusal
from qnext.server.routes import Route
from qnext.server.sampling import DEFAULTS
from qnext.server.served import ServedModel
from qnext.server.visit import NO_ANSWER, Visit
from qnext.server.worker import EngineWorker

if TYPE_CHECKING:
    from qnext.engine import Engine
    from qnext.engine.sampling.constraint import Constraint
    from qnext.engine.sampling.grammar import CompiledGrammar

_log = logging.getLogger("qnext.server")
_MAX_IGNORED = 512  # different names that the log has
State = Literal["loading", "ready", "draining"]


@dataclass
class Admitted:
    """A request within its key's limits. Whoever runs it says at the end how many tokens it wrote."""

    num_output: int = 0


class Server:
    """One model behind HTTP. It is made before the model is loaded; `attach` makes it ready.

    Belongs to one event loop. `audit` None writes no audit log.
    """

    def __init__(
        self,
        *,
        keys: KeyRing | None = None,
        limits: Limits | None = None,
        audit: AuditLog | None = None,
        metrics_compat: Literal["vllm"] | None = None,
        origins: Iterable[str] = (),
        allowed_hosts: Iterable[str] = (),
        with_page: bool = True,
        open_readiness: bool = False,
    ) -> None:
        self.keys = keys or KeyRing()
        self.limits = limits or Limits()
        self.audit = audit
        self.metrics_compat = metrics_compat
        self.origins = frozenset(origins)
        self.allowed_hosts = tuple(allowed_hosts)
        self.with_page = with_page
        self.open_readiness = open_readiness
        self.rates = KeyRates()
        most = max(MAX_HELD_BYTES_PER_KEY, self.limits.max_body_bytes)
        self.bodies = Budget(most=max(MAX_HELD_BYTES, most), per_owner=most)
        self.parsing = Lane("parsing", num_threads=2, per_owner=1, max_waiting=MAX_LARGE_WAITING)
        # Whoever waits here has been let in: nobody is refused.
        self.writing = Lane("writing", num_threads=1, per_owner=1, max_waiting=sys.maxsize, max_all=sys.maxsize)
        self.logins = FailedLogins()
        self.counters = ServerCounters()
        self.state: State = "loading"
        self.stop_wanted = asyncio.Event()
        self.is_hurried = False  # told to stop a second time: what runs ends now
        self.active: set[Exchange] = set()
        self.tasks: dict[Exchange, asyncio.Future[None]] = {}
        self.own_work = OwnLedger(self.active)
        self._ignored: set[tuple[str, str]] = set()
        self._served: ServedModel | None = None
        self._worker: EngineWorker | None = None
        self._live: LiveHub | None = None
        self._metrics: ServerMetrics | None = None

    def attach(self, engine: Engine, served: ServedModel) -> None:
        """The model is loaded: begin to answer. Called in the event loop."""
        self._served = served
        self._worker = EngineWorker(engine, self.limits)
        self._worker.start()
        self._live = LiveHub(engine, describe=describe(served, self.limits), own=self.own_work.of)
        self._metrics = ServerMetrics(
            self.counters, model_name=served.name, block_size=engine.memory_plan.block_size, source=engine,
            num_waiting=lambda: self.worker.num_queued,
        )  # fmt: skip
        self.state = "ready"

    @property
    def served(self) -> ServedModel:
        assert self._served is not None
        return self._served

    @property
    def worker(self) -> EngineWorker:
        assert self._worker is not None
        return self._worker

    @property
    def live(self) -> LiveHub:
        assert self._live is not None
        return self._live

    @property
    def is_ready(self) -> bool:
        """Loaded, not draining, and the engine's thread has shown that it lives."""
        return self.state == "ready" and self.fault is None

    @property
    def fault(self) -> str | None:
        """Why a loaded engine does not work, if it does not."""
        if self._worker is None:
            return None
        if not self._worker.is_alive:  # as it is when the server has stopped it
            return "the engine has failed" if self.state == "ready" else None
        if self._worker.is_broken:
            return "the engine has failed"
        if time.monotonic() - self._worker.heartbeat > self.limits.watchdog_seconds:
            return "a step of the engine does not end"
        return None

    @property
    def losses(self) -> list[str]:
        """What goes wrong while requests are answered all the same."""
        return ["the audit log loses lines"] if self.audit is not None and self.audit.is_failing else []

    # ---- what endpoints ask ----

    def authorize(self, exchange: Exchange) -> Key | None:
        """The key of a request. Raises ApiError 401, 403, or 429 after many wrong ones."""
        scope = exchange.route.scope
        if scope == "public" or (self.keys.is_open and scope != "admin"):
            return None
        secret = _secret(exchange.headers)
        key = None if secret is None else self.keys.find(secret)
        if key is None:
            exchange.claimed = None if secret is None else self.keys.recognise(secret)
            self.counters.count_auth_failure()
            refusal = self.logins.fail(exchange.client)
            if refusal is not None:
                raise _refused(refusal)
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        exchange.key = key
        if scope != "any" and scope not in key.scopes:
            raise ApiError(403, f"this key lacks the scope {scope}", code="insufficient_scope")
        return key

    def sees_all(self, key: Key | None) -> bool:
        """Whether this key may see what the requests of others do: an administrator's, or where there are no others."""
        return key is None or "admin" in key.scopes or self.keys.has_one_user

    def check_running(self, route: Route) -> None:
        """Raises ApiError 503 while the model is loaded or the server stops, where the route needs the model."""
        if route.limit in ("probe", "static"):
            return
        if self._served is None:
            raise ApiError.busy("the model is being loaded", retry_after=5.0, code="loading")
        if self.state == "draining" and route.limit == "generation":
            raise ApiError.busy("the server is stopping", retry_after=5.0, code="draining")

    def check_model(self, exchange: Exchange, name: str | None) -> None:
        """Raises ApiError 404 for another model, and 403 for one that the key may not use."""
        self.served.check_name(name)
        exchange.outcome.model = self.served.name
        asked = name if name in self.served.names else self.served.name
        if exchange.key is not None and not exchange.key.allows_model(asked):
            raise ApiError(403, "this key may not use this model", code="model_not_allowed", param="model")

    def note_ignored(self, path: str, name: str) -> None:
        """One line in the log for the first request that holds something without effect."""
        if (path, name) not in self._ignored and len(self._ignored) < _MAX_IGNORED:
            self._ignored.add((path, name))
            _log.warning("%s: %s has no effect; answers that ignore it say so in %s", path, name, IGNORED_HEADER)

    def check_rates(self, exchange: Exchange) -> None:
        """Raises ApiError 429 where the limits of the key refuse any request now."""
        refusal = None if exchange.key is None else self.rates.peek(exchange.key)
        if refusal is not None:
            exchange.reply_headers.update(refusal.headers)
            raise _refused(refusal)

    @contextlib.contextmanager
    def admission(self, exchange: Exchange, num_prompt: int) -> Iterator[Admitted]:
        """A request within the limits of its key. Raises ApiError 429, or 400 where waiting does not help."""
        admitted = Admitted()
        key = exchange.key
        if key is None:
            yield admitted
            return
        refusal = self.rates.check(key, num_prompt)
        exchange.reply_headers.update(refusal.headers if refusal else self.rates.headers(key))
        if refusal is not None:
            raise _refused(refusal)
        try:
            yield admitted
        finally:
            self.rates.finish(key, num_prompt, num_prompt + admitted.num_output)

    async def compiled(self, constraint: Constraint, *, param: str, owner: str = "") -> CompiledGrammar:
        """The grammar of a constraint, in the share of its owner. Raises ApiError 400, 429 or 503."""
        started = time.perf_counter()
        try:
            return await self.served.compile(constraint, param=param, owner=owner)
        finally:
            self.counters.observe_grammar_compile(time.perf_counter() - started)

    async def guide(self, constraint: Constraint | None, *, param: str, owner: str = "") -> Any:
        """The state of a constraint for one request; None without one."""
        return None if constraint is None else (await self.compiled(constraint, param=param, owner=owner)).new_state()

    def render_metrics(self) -> bytes:
        self.counters.is_ready = self.is_ready
        self.counters.audit_lines_lost = 0 if self.audit is None else self.audit.num_failed
        self.counters.open_streams = sum(exchange.outcome.stream for exchange in self.active)
        metrics = self._metrics or ServerMetrics(self.counters, model_name="", block_size=0)
        return metrics.render(self.metrics_compat)

    def book(self, exchange: Exchange, seconds: float) -> None:
        """Count a request that has ended, and write its line; what a monitor asks all day leaves one when refused."""
        route, outcome = exchange.route, exchange.outcome
        self.own_work.end(exchange)
        self.counters.count_request(route.path, route.method, outcome.status)
        if self.audit is None or (route.audit == "refusals" and outcome.status < 400):
            return
        key = exchange.key or exchange.claimed
        self.audit.write(
            AuditRecord(
                request_id=exchange.request_id, route=route.path, method=route.method, client=exchange.client,
                key_id=None if key is None else key.id, seconds=round(seconds, 6),
                **vars(outcome),
            )
        )  # fmt: skip

    def book_visit(self, visit: Visit) -> None:
        """Count a request that no route has answered, and write its line."""
        self.counters.count_request(visit.route, visit.method or "", visit.status)
        if visit.status >= 400 and visit.status != NO_ANSWER:
            self.counters.count_rejection(visit.error_code or str(visit.status))
        if self.audit is None:
            return
        secret = _secret({name.decode("latin-1"): value.decode("latin-1") for name, value in visit.headers})
        key = None if secret is None else self.keys.recognise(secret)
        self.audit.write(
            AuditRecord(
                request_id=visit.request_id, route=visit.route, client=visit.client,
                method=visit.method if visit.method in KNOWN_METHODS else None,  # another could be any word
                key_id=None if key is None else key.id, seconds=round(time.perf_counter() - visit.began, 6),
                status=visit.status, error_code=visit.error_code,
            )
        )  # fmt: skip

    # ---- its end ----

    def request_stop(self) -> None:
        """Begin to drain; whoever runs the server does the rest."""
        self.state = "draining"
        self.stop_wanted.set()

    async def drain(self, seconds: float) -> None:
        """Take no more requests and let those that run end for so long; then tell them that the server stops."""
        self.state = "draining"
        if self._live is not None:
            self._live.close()
        end = time.monotonic() + seconds
        while self.tasks and time.monotonic() < end and not self.is_hurried:
            await asyncio.sleep(0.05)
        if self._worker is not None:
            await self._worker.stop()
        # The streams have their last event by now, and a moment to send it.
        end = time.monotonic() + 2.0
        while self.tasks and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for exchange, task in list(self.tasks.items()):
            exchange.outcome.error_code = "unavailable"
            task.cancel()

    def close(self) -> None:
        self.parsing.close()
        self.writing.close()
        if self._served is not None:
            self._served.close()
        if self.audit is not None:
            self.audit.close()
            self.audit = None  # connections that close after the server are no lost lines


def describe(served: ServedModel, limits: Limits) -> dict[str, Any]:
    """What GET /live/model says beside the layers."""
    return {
        "model": served.name,
        "max_model_len": served.max_model_len,
        "sampling": {**DEFAULTS, **served.defaults},
        "has_chat": served.chat_format is not None,
        "thinking": served.is_thinking,
        "limits": asdict(limits),
    }


def make_application(server: Server, routes: Sequence[Route], *, bound: str | None = "127.0.0.1") -> Guard:
    """An ASGI application of the routes, for a listener that is bound to that address; None is a Unix socket.

    Raises UsageError where the server is to have a name that is none.
    """
    table = [StarletteRoute(route.path, Endpoint(server, route), methods=[route.method]) for route in routes]
    for entry, route in zip(table, routes, strict=True):
        if route.limit == "generation" and entry.methods is not None:
            entry.methods.discard("HEAD")  # an answer without an end has no head to ask for alone

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        is_method = error.status_code == 405
        fault = ApiError(
            error.status_code, "this route has other methods" if is_method else "no such route",
            code="method_not_allowed" if is_method else "not_found",
        )  # fmt: skip
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


def _secret(headers: Mapping[str, str]) -> str | None:
    authorization = headers.get("authorization")
    if authorization is None:
        return headers.get("x-api-key")
    scheme, _, secret = authorization.partition(" ")
    return secret if scheme.lower() == "bearer" and secret else None


def _refused(refusal: Refusal) -> ApiError:
    if refusal.retry_after is None:
        return ApiError.bad(refusal.message, code="context_length_exceeded")
    headers = {**refusal.headers, "Retry-After": str(max(1, round(refusal.retry_after + 0.5)))}
    return ApiError(429, refusal.message, code="rate_limit_exceeded", headers=headers)
