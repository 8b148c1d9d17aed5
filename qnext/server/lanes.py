"""Threads for work that grows with a body. Owners take turns, so that nobody waits long for the work of others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from qnext.server.errors import ApiError

Result = TypeVar("Result")
LARGE = 1 << 16  # bytes of a body, or characters of a text, that make work large


class Asker(NamedTuple):
    """The owner for whom something is computed, and the bytes of the request's body."""

    owner: str = ""
    num_bytes: int = 0

    @property
    def is_large(self) -> bool:
        return self.num_bytes > LARGE


class Lane:
    """`num_threads` threads. Of one owner, at most `per_owner` jobs run at once and at most `max_waiting` wait.

    A lane belongs to one event loop. A job whose caller has left keeps its thread until it ends; `stop` asks it to end.
    """

    def __init__(self, name: str, *, num_threads: int, per_owner: int, max_waiting: int, max_all: int = 1_024) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_free = num_threads
        self._per_owner = per_owner
        self._max_waiting = max_waiting
        self._max_all = max_all
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next owner first

    async def run(
        self, owner: str, function: Callable[[], Result], *, stop: Callable[[], None] | None = None
    ) -> Result:
        """The result of `function`, or what it raises. Raises ApiError 429 or 503 where too many jobs wait already."""
        await self._enter(owner)
        loop = asyncio.get_running_loop()
        try:
            job = self._threads.submit(function)
        except BaseException:
            self._leave(owner)
            raise

        def ended(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._leave, owner)

        job.add_done_callback(ended)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if stop is not None:
                stop()
            raise

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _may_run(self, owner: str) -> bool:
        return self._num_free > 0 and self._running[owner] < self._per_owner

    async def _enter(self, owner: str) -> None:
        queue = self._waiting.get(owner, ())
        if not queue and self._may_run(owner):
            self._take(owner)
            return
        if len(queue) >= self._max_waiting:
            raise ApiError.over_limit("too many large requests of this caller wait already", retry_after=2.0)
        if self.num_waiting >= self._max_all:
            raise ApiError.busy("too many large requests wait already", retry_after=2.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._promote()  # those before may have left
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(KeyError, ValueError):  # it was passed over by now
                    self._waiting[owner].remove(turn)
                self._promote()
            else:  # its turn had come
                self._leave(owner)
            raise

    def _take(self, owner: str) -> None:
        self._num_free -= 1
        self._running[owner] += 1

    def _leave(self, owner: str) -> None:
        self._num_free += 1
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        self._promote()

    def _promote(self) -> None:
        """Give free threads to those who wait, and drop turns that were cancelled."""
        for owner, queue in list(self._waiting.items()):
            while queue and (queue[0].done() or self._may_run(owner)):
                turn = queue.popleft()
                if not turn.done():
                    self._take(owner)
                    turn.set_result(None)
                    self._waiting.move_to_end(owner)
                    break
            if not queue:
                del self._waiting[owner]


class Budget:
    """Bounds the bytes of bodies that are held at once, for all owners together and for each owner."""

    def __init__(self, *, most: int, per_owner: int) -> None:
        self._most = most
        self._per_owner = per_owner
        self._held: Counter[str] = Counter()
        self._total = 0

    def take(self, owner: str, count: int) -> None:
        """Take bytes of the budget. Where that would be too much, it takes nothing and raises ApiError 429 or 503."""
        if self._held[owner] + count > self._per_owner:
            raise ApiError.over_limit("too many large bodies of this caller are held already", retry_after=2.0)
        if self._total + count > self._most:
            raise ApiError.busy("too many large bodies are held already", retry_after=2.0)
        self._held[owner] += count
        self._total += count

    def give_back(self, owner: str, count: int) -> None:
        self._total -= count
        self._held[owner] -= count
        if not self._held[owner]:
            del self._held[owner]
