"""The server as one object. It holds everything that lives as long as the process, in place of globals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from qnext.server.access.audit import AuditLog, AuditRecord
from qnext.server.access.keys import Key, KeyRing
from qnext.server.access.rates import FailedLogins, KeyRates, Refusal
from qnext.server.errors import ApiError
from qnext.server.inference.served import ServedModel
from qnext.server.inference.worker import EngineWorker
from qnext.server.lanes import Budget, Lane
from qnext.server.limits import MAX_HELD_BYTES, MAX_HELD_BYTES_PER_KEY, MAX_LARGE_WAITING, Limits
from qnext.server.metrics import KNOWN_METHODS, ServerCounters, ServerMetrics
from qnext.server.moderation.moderator import ModerationConfig, Moderator
from qnext.server.requests import NO_ANSWER, HttpRequest, Visit
from qnext.server.routes import Route
from qnext.server.view.live import LiveHub
from qnext.server.view.own_work import OwnLedger

if TYPE_CHECKING:
    from qnext.engine import Engine
    from qnext.engine.sampling.constraint import Constraint
    from qnext.engine.sampling.grammar import CompiledGrammar
    from qnext.server.expert_watch import ExpertWatch

_log = logging.getLogger("qnext.server")
IGNORED_HEADER = "X-Qnext-Ignored"
_MAX_IGNORED = 512  # different names that the log has
ServerState = Literal["loading", "ready", "draining"]


@dataclass
class Admitted:
    """A request within the limits of its key. `num_output` is set when it ends."""

    num_output: int = 0


class Server:
    """One model behind HTTP. It is made before the model is loaded; `attach` makes it ready.

    It belongs to one event loop. `audit` None means no audit log, `expert_watch` None no watch over the experts,
    `moderation` None no say of the operator about texts.
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
        expert_watch: ExpertWatch | None = None,
        moderation: ModerationConfig | None = None,
    ) -> None:
        self.keys = keys or KeyRing()
        self.limits = limits or Limits()
        self.audit = audit
        self.metrics_compat = metrics_compat
        self.origins = frozenset(origins)
        self.allowed_hosts = tuple(allowed_hosts)
        self.with_page = with_page
        self.open_readiness = open_readiness
        self.expert_watch = expert_watch
        self.rates = KeyRates()
        most = max(MAX_HELD_BYTES_PER_KEY, self.limits.max_body_bytes)
        self.bodies = Budget(most=max(MAX_HELD_BYTES, most), per_owner=most)
        self.parsing = Lane("parsing", num_threads=2, per_owner=1, max_waiting=MAX_LARGE_WAITING)
        # Whoever waits here has been let in: nobody is refused.
        self.writing = Lane("writing", num_threads=1, per_owner=1, max_waiting=sys.maxsize, max_all=sys.maxsize)
        self.logins = FailedLogins()
        self.counters = ServerCounters()
        self.moderator = None if moderation is None else Moderator(moderation, self.counters)
        self.state: ServerState = "loading"
        self.stop_wanted = asyncio.Event()
        self.is_hurried = False  # told to stop a second time: what runs ends now
        self.active: set[HttpRequest] = set()
        self.tasks: dict[HttpRequest, asyncio.Future[None]] = {}
        self.own_work = OwnLedger(self.active)
        self._ignored: set[tuple[str, str]] = set()
        self._served: ServedModel | None = None
        self._worker: EngineWorker | None = None
        self._live: LiveHub | None = None
        self._metrics: ServerMetrics | None = None

    def attach(self, engine: Engine, served: ServedModel) -> None:
        """The model is loaded: begin to answer. It is called in the event loop."""
        self._served = served
        self._worker = EngineWorker(engine, self.limits)
        self._worker.start()
        about = describe(served, self.limits)
        self._live = LiveHub(engine, describe=about, own=self.own_work.of, watch=self.expert_watch)
        self._metrics = ServerMetrics(
            self.counters,
            model_name=served.name,
            block_size=engine.memory_plan.block_size,
            source=engine,
            num_waiting=lambda: self.worker.num_queued,
            watch=self.expert_watch,
        )
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
        """Whether the model is loaded, the server does not drain, and the engine's thread has shown that it lives."""
        return self.state == "ready" and self.fault is None

    @property
    def fault(self) -> str | None:
        """Why a loaded engine does not work; None where it works."""
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
    def lost(self) -> BaseException | None:
        """What has ended the engine for good, so that the server ends as well."""
        return None if self._worker is None else self._worker.lost

    @property
    def losses(self) -> list[str]:
        """What is lost while requests are still answered."""
        return ["the audit log loses lines"] if self.audit is not None and self.audit.is_failing else []

    # ---- what endpoints ask ----

    def authorize(self, request: HttpRequest) -> Key | None:
        """The key of a request. Raises ApiError 401 or 403, or 429 after many wrong keys."""
        scope = request.route.scope
        if scope == "public" or (self.keys.is_open and scope != "admin"):
            return None
        secret = secret_of(request.headers)
        key = None if secret is None else self.keys.find(secret)
        if key is None:
            request.claimed = None if secret is None else self.keys.recognise(secret)
            self.counters.count_auth_failure()
            refusal = self.logins.fail(request.client)
            if refusal is not None:
                raise _refused(refusal)
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        request.key = key
        if scope != "any" and scope not in key.scopes:
            raise ApiError(403, f"this key lacks the scope {scope}", code="insufficient_scope")
        return key

    def sees_all(self, key: Key | None) -> bool:
        """Whether this key may see the work of all requests: a key of an administrator may, and the only key of a
        server."""
        return key is None or "admin" in key.scopes or self.keys.has_one_user

    def check_running(self, route: Route) -> None:
        """Raises ApiError 503 while the model is loaded or the server stops, where the route needs the model."""
        if route.limit in ("probe", "static"):
            return
        if self._served is None:
            raise ApiError.busy("the model is being loaded", retry_after=5.0, code="loading")
        if self.state == "draining" and route.limit == "generation":
            raise ApiError.busy("the server is stopping", retry_after=5.0, code="draining")

    def check_model(self, request: HttpRequest, name: str | None) -> None:
        """Raises ApiError 404 for another model, and 403 for one that the key may not use."""
        self.served.check_name(name)
        request.outcome.model = name if name in self.served.adapters else self.served.name
        asked = name if name in self.served.all_names else self.served.name
        if request.key is not None and not request.key.allows_model(asked):
            raise ApiError(403, "this key may not use this model", code="model_not_allowed", param="model")

    def note_ignored(self, path: str, name: str) -> None:
        """Log a field without effect the first time that a request has it."""
        if (path, name) not in self._ignored and len(self._ignored) < _MAX_IGNORED:
            self._ignored.add((path, name))
            _log.warning("%s: %s has no effect; answers that ignore it say so in %s", path, name, IGNORED_HEADER)

    def check_rates(self, request: HttpRequest) -> None:
        """Raises ApiError 429 where the limits of the key refuse every request now."""
        refusal = None if request.key is None else self.rates.peek(request.key)
        if refusal is not None:
            request.reply_headers.update(refusal.headers)
            raise _refused(refusal)

    @contextlib.contextmanager
    def admission(self, request: HttpRequest, num_prompt: int) -> Iterator[Admitted]:
        """A request within the limits of its key. Raises ApiError 429, or 400 where waiting does not help."""
        admitted = Admitted()
        key = request.key
        if key is None:
            yield admitted
            return
        refusal = self.rates.check(key, num_prompt)
        request.reply_headers.update(refusal.headers if refusal else self.rates.headers(key))
        if refusal is not None:
            raise _refused(refusal)
        try:
            yield admitted
        finally:
            self.rates.finish(key, num_prompt, num_prompt + admitted.num_output)

    async def compiled(self, constraint: Constraint, *, param: str, owner: str = "") -> CompiledGrammar:
        """The grammar of a constraint. Its time counts against the owner. Raises ApiError 400, 429 or 503."""
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
        self.counters.open_streams = sum(request.outcome.stream for request in self.active)
        metrics = self._metrics or ServerMetrics(self.counters, model_name="", block_size=0)
        return metrics.render(self.metrics_compat)

    def book(self, request: HttpRequest, seconds: float) -> None:
        """Count a request that has ended, and write its line in the audit log. Probes have a line only when they are
        refused."""
        route, outcome = request.route, request.outcome
        self.own_work.end(request)
        self.counters.count_request(route.path, route.method, outcome.status)
        if self.audit is None or (route.audit == "refusals" and outcome.status < 400):
            return
        key = request.key or request.claimed
        record = AuditRecord(
            request_id=request.request_id,
            route=route.path,
            method=route.method,
            client=request.client,
            key_id=None if key is None else key.id,
            seconds=round(seconds, 6),
            **vars(outcome),
        )
        self.audit.write(record)

    def book_visit(self, visit: Visit) -> None:
        """Count a request that no route has answered, and write its line."""
        self.counters.count_request(visit.route, visit.method or "", visit.status)
        if visit.status >= 400 and visit.status != NO_ANSWER:
            self.counters.count_rejection(visit.error_code or str(visit.status))
        if self.audit is None:
            return
        secret = secret_of({name.decode("latin-1"): value.decode("latin-1") for name, value in visit.headers})
        key = None if secret is None else self.keys.recognise(secret)
        record = AuditRecord(
            request_id=visit.request_id,
            route=visit.route,
            client=visit.client,
            method=visit.method if visit.method in KNOWN_METHODS else None,  # another could be any word
            key_id=None if key is None else key.id,
            seconds=round(time.perf_counter() - visit.began, 6),
            status=visit.status,
            error_code=visit.error_code,
        )
        self.audit.write(record)

    # ---- its end ----

    def request_stop(self) -> None:
        """Begin to drain. The code that runs the server does the rest."""
        self.state = "draining"
        self.stop_wanted.set()

    async def drain(self, seconds: float) -> None:
        """Take no more requests. Running requests have `seconds` to end; then they end with an error."""
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
        for request, task in list(self.tasks.items()):
            request.outcome.error_code = "unavailable"
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
        "sampling": served.defaults,
        "has_chat": served.chat_format is not None,
        "thinking": served.is_thinking,
        "limits": asdict(limits),
    }


def secret_of(headers: Mapping[str, str]) -> str | None:
    """The secret that a request comes with; header names are in lower case."""
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
