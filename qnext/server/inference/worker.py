"""The one thread that owns the engine, and the queue before it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from qnext.engine.policy.params import SamplingParams
from qnext.engine.policy.request import Request
from qnext.engine.policy.step import EndEvent, TokenEvent
from qnext.errors import CorruptCheckpoint, NotFinite, QnextError, ends_engine, is_fault
from qnext.server.errors import ApiError, from_user_error
from qnext.server.inference.generation import Generation, Update
from qnext.server.limits import Limits

if TYPE_CHECKING:
    from qnext.engine import Engine

_log = logging.getLogger("qnext.server")
_HEARTBEAT = 1.0  # seconds
# In a row: steps that raise, until the engine is broken; requests that break, until the worker tries the engine.
_MAX_FAILURES = 3
_MAX_CANARIES = 3  # requests of the worker's own that break in a row, until the engine is broken


class EngineWorker:
    """Runs an engine in its own thread. Requests come from, and tokens go to, the event loop that started it.

    Generations wait here, first come, first served for each owner. The engine gets a generation when it could soon
    begin it, and always holds one of each waiting owner, so that it can share its seats among owners. A request that
    breaks the model's arithmetic ends alone. When several requests break one after another, the worker tries a request
    of its own, which no client can shape. The engine `is_broken` when these break too, or when several steps in a row
    raise.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.is_broken = False
        self.lost: BaseException | None = None  # after which the engine can do nothing more
        self.heartbeat = time.monotonic()  # when the thread last showed that it lives
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = threading.Condition()
        self._waiting: OrderedDict[str, deque[Generation]] = OrderedDict()  # by owner, the next owner first
        self._num_waiting = 0  # sequences in `_waiting`
        self._aborts: deque[tuple[Generation, int | None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._running: dict[str, tuple[Generation, int]] = {}  # by the engine's request id
        self._unstarted: dict[int, Generation] = {}  # in the engine, before its first step; by id()
        self._news_lock = threading.Lock()
        self._held: dict[int, _News] = {}  # by id of the generation: what the event loop has not been told yet
        self._is_telling = False  # it has been called, or is still busy with what it was told last
        self._is_stopping = False
        self._num_failures = 0  # steps that raised, one after another
        self._num_faults = 0  # requests that broke, and no token came meanwhile
        self._canary: Request | None = None
        self._num_dead_canaries = 0
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- the event loop's side ----

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the running requests, write the cache to disk, and wait for the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def num_queued(self) -> int:
        """Sequences that have not had their first step."""
        return self._num_waiting + self.engine.num_waiting

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def by_owner(self) -> dict[str, dict[str, int]]:
        """For each owner: its requests that run and wait in the engine, and what it holds of memory and tiers."""
        return {owner: gauges._asdict() for owner, gauges in self.engine.by_owner().items()}

    def enqueue(self, generation: Generation) -> None:
        """Put a generation into the queue. Raises ApiError 503 when the queue is full, and 429 when the owner's part of
        it is."""
        number = generation.params.n
        with self._wake:
            if self._is_stopping or self.is_broken:
                raise ApiError.busy("the engine does not run", retry_after=10.0, code="unavailable")
            if self._num_waiting + number > self.limits.max_queued:
                raise ApiError.busy("the queue is full", retry_after=self.limits.retry_seconds)
            queue = self._waiting.get(generation.owner, deque())
            if sum(waiting.params.n for waiting in queue) + number > self.limits.max_queued_per_key:
                raise ApiError.over_limit(
                    "too many requests of this key are waiting", retry_after=self.limits.retry_seconds
                )
            queue.append(generation)
            self._waiting[generation.owner] = queue
            self._num_waiting += number
            self._wake.notify()

    def abort(self, generation: Generation, index: int | None = None) -> None:
        """End one answer of a generation, or all answers. Answers that have ended are ignored."""
        with self._wake:
            self._aborts.append((generation, index))
            self._wake.notify()

    def rest(self, generation: Generation, *, is_parked: bool) -> None:
        """Park a generation while its client does not read, or continue it."""
        self.call(partial(self._rest, generation, is_parked))

    def call(self, function: Callable[[], None]) -> None:
        """Have the engine's thread run `function` between two steps. Returns at once."""
        with self._wake:
            self._calls.append(function)
            self._wake.notify()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            while self._wait():
                self.heartbeat = time.monotonic()
                self._obey()
                self._admit()
                self._step()
                self.heartbeat = time.monotonic()
        except BaseException as error:
            if ends_engine(error):
                self.lost = error
            else:
                _log.exception("the engine's thread ended")
            self.is_broken = True
        finally:
            self._fail_all(ApiError.busy("the server is stopping", retry_after=10.0, code="unavailable"))
            self.engine.close()

    def _wait(self) -> bool:
        """Until there is something to do; False when the thread is to end."""
        with self._wake:
            while not (self._is_stopping or self._waiting or self._aborts or self._calls or self.engine.has_unfinished):
                self._wake.wait(_HEARTBEAT)
                self.heartbeat = time.monotonic()
            return not self._is_stopping

    def _obey(self) -> None:
        """Aborts and calls."""
        while self._aborts:
            generation, index = self._aborts.popleft()
            if not generation.requests:
                self._forget_waiting(generation)
            for number, request in enumerate(generation.requests):
                if index in (None, number) and self._running.pop(request.id, None) is not None:
                    self.engine.abort(request.id)
            self._unstarted.pop(id(generation), None)
        while self._calls:
            function = self._calls.popleft()
            try:
                function()
            except Exception:  # whoever wants to know of it says so inside
                _log.exception("a call between two steps failed")

    def _forget_waiting(self, generation: Generation) -> None:
        with self._wake:
            queue = self._waiting.get(generation.owner)
            if queue is not None and generation in queue:
                queue.remove(generation)
                self._num_waiting -= generation.params.n
                if not queue:
                    del self._waiting[generation.owner]

    def _admit(self) -> None:
        """Give the engine what it could soon begin, the owners in turn."""
        while (generation := self._next()) is not None:
            self._begin(generation)
        self._drop_late()

    def _next(self) -> Generation | None:
        engine = self.engine
        has_room = engine.num_waiting < engine.max_num_seqs
        with self._wake:
            owner = next((o for o in self._waiting if has_room or not engine.num_waiting_of(o)), None)
            if owner is None:
                return None
            queue = self._waiting[owner]
            generation = queue.popleft()
            self._num_waiting -= generation.params.n
            if queue:
                self._waiting.move_to_end(owner)
            else:
                del self._waiting[owner]
            return generation

    def _rest(self, generation: Generation, is_parked: bool) -> None:
        generation.is_parked = is_parked
        for request in generation.requests:
            self.engine.rest(request, is_parked=is_parked)

    def _begin(self, generation: Generation) -> None:
        now = time.monotonic()
        if now >= generation.queue_deadline:
            self._fail([generation], self._late())
            return
        try:
            generation.requests = self.engine.add_requests(
                generation.prompt_ids,
                generation.params,
                request_id=f"{next(self._numbers)}",
                salt=generation.salt,
                owner=generation.owner,
                adapter=generation.adapter,
                guide=generation.guide,
                timeout=max(0.0, generation.deadline - now),
            )
        except QnextError as error:
            self._fail([generation], from_user_error(error))
            return
        except BaseException as error:  # what one request breaks must not end the thread that serves all
            if not is_fault(error):
                raise
            _log.exception("request %s cannot be begun", generation.request_id)
            self._fail([generation], ApiError.internal())
            return
        self._unstarted[id(generation)] = generation
        for index, request in enumerate(generation.requests):
            self._running[request.id] = (generation, index)
        if generation.is_parked:
            self._rest(generation, True)

    def _drop_late(self) -> None:
        """Refuse what has waited too long, here or in the engine."""
        now = time.monotonic()
        with self._wake:
            late = [g for queue in self._waiting.values() for g in queue if now >= g.queue_deadline]
        for generation in late:
            self._forget_waiting(generation)
            self._fail([generation], self._late())
        for generation in list(self._unstarted.values()):
            if any(request.times.scheduled is not None for request in generation.requests):
                del self._unstarted[id(generation)]
            elif now >= generation.queue_deadline:
                self._drop(generation)
                self._fail([generation], self._late())

    def _late(self) -> ApiError:
        return ApiError.busy("the request waited too long for its turn", retry_after=5.0, code="queue_timeout")

    def _drop(self, generation: Generation) -> None:
        self._unstarted.pop(id(generation), None)
        for request in generation.requests:
            if self._running.pop(request.id, None) is not None:
                self.engine.abort(request.id)

    def _step(self) -> None:
        if not self.engine.has_unfinished:
            return
        try:
            events = self.engine.step()
        except BaseException as error:
            if not is_fault(error) or ends_engine(error):
                raise
            _log.exception("a step of the engine failed")
            self._num_failures += 1
            self._fail_lost()
            if self._num_failures >= _MAX_FAILURES:
                self.is_broken = True
                self._fail_all(ApiError.internal())
            return
        self._num_failures = 0
        self._watch(events)
        with self._news_lock:
            for event in events:
                self._note(event)
        self._tell()

    def _note(self, event: TokenEvent | EndEvent) -> None:
        """Keep an event for its generation, if that has not ended."""
        entry = self._running.get(event.request_id)
        if entry is None:
            return
        generation, index = entry
        news = self._held.setdefault(id(generation), _News(generation))
        token = event.token if isinstance(event, TokenEvent) else None
        news.updates.append(Update(index, token, event.finish_reason))
        if event.finish_reason is not None:
            del self._running[event.request_id]
            news.failure = news.failure or self._failure_of(generation.requests[index])
            if news.failure is not None:
                self._drop(generation)

    def _watch(self, events: Sequence[TokenEvent | EndEvent]) -> None:
        """Count the requests that broke one after another; after several, try the engine with a request of its own.

        Clients may have shaped the others. A request of one random token, alone in its step, breaks only where all do.
        """
        for event in events:
            entry = self._running.get(event.request_id)
            is_canary = self._canary is not None and event.request_id == self._canary.id
            if isinstance(event, TokenEvent):
                self._num_faults = 0
                self._num_dead_canaries = 0
            elif is_canary:
                self._num_dead_canaries += 1
            elif entry is not None and entry[0].requests[entry[1]].fault is not None:
                self._num_faults += 1
            if is_canary:
                self._canary = None
        if self._num_dead_canaries >= _MAX_CANARIES:
            _log.critical("the engine answers nothing, not even requests of its own")
            self.is_broken = True
            self._fail_all(ApiError.internal())
        elif self._num_faults >= _MAX_FAILURES and self._canary is None:
            number = next(self._numbers)
            prompt = [number % self.engine.model_config.vocab_size]
            params = SamplingParams(max_tokens=1, ignore_eos=True)
            self._canary = self.engine.add_request(prompt, params, request_id=f"canary-{number}", salt=f"{number}")
            self.engine.run_apart(self._canary)

    def _failure_of(self, request: Request) -> ApiError | None:
        if request.finish_reason == "deadline":
            headers = {"x-should-retry": "false"}
            return ApiError(504, "the request took too long", code="request_timeout", headers=headers)
        if request.fault is not None:
            if isinstance(request.fault, CorruptCheckpoint):
                is_number = isinstance(request.fault, NotFinite)
                told = (
                    "the model gave no finite numbers" if is_number else "a part of the model cannot be read from disk"
                )
                return ApiError.internal(told)
            return ApiError.internal()
        if request.failure is not None:
            return ApiError.bad(from_user_error(request.failure).message, code="constraint_failed")
        return None

    def _fail_lost(self) -> None:
        """A step raised, and the engine has ended its requests: tell their generations."""
        lost = {id(g): g for g, index in self._running.values() if g.requests[index].finish_reason is not None}
        for generation in lost.values():
            self._drop(generation)
        self._fail(lost.values(), ApiError.internal())

    def _fail_all(self, failure: ApiError) -> None:
        with self._wake:
            self._is_stopping = True
            generations = {id(g): g for queue in self._waiting.values() for g in queue}
            generations |= {id(g): g for g, _ in self._running.values()}
            self._waiting.clear()
            self._running.clear()
        self._fail(generations.values(), failure)

    def _fail(self, generations: Iterable[Generation], failure: ApiError) -> None:
        with self._news_lock:
            for generation in generations:
                self._held.setdefault(id(generation), _News(generation)).failure = failure
        self._tell()

    def _tell(self) -> None:
        """Have the event loop deliver all that is held: at once, or when it has done what it was told last.

        So no token waits for the next step, and a loop that is behind gets the tokens of several steps together.
        """
        assert self._loop is not None
        with self._news_lock:
            if not self._held or self._is_telling:
                return
            self._is_telling = True
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """In the event loop: deliver all that is held, and look again after its readers have run."""
        with self._news_lock:
            news, self._held = list(self._held.values()), {}
            self._is_telling = bool(news)
        for entry in news:
            entry.generation.deliver(entry.updates, entry.failure)
        if news:
            assert self._loop is not None
            self._loop.call_soon(self._deliver)


@dataclass
class _News:
    generation: Generation
    updates: list[Update] = field(default_factory=list)
    failure: ApiError | None = None
