"""Tests of time that hold on any machine: work is compared with work of the same run, and no clock is waited for."""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import os
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

TRIES = 4  # of what may be late for a reason of its own
_NOMINAL = 0.0030  # seconds of `_reference` on the machine that limits were written on


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of this thread. What the collector of garbage would add has nothing to do with `work`."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        begin = time.thread_time()
        work()
        return time.thread_time() - begin
    finally:
        if was_enabled:
            gc.enable()


def growth(small: Callable[[], object], large: Callable[[], object], *, tries: int = 5) -> float:
    """How many times the processor time of `small` it is that `large` takes: the least of each, tried in turn."""
    least = [math.inf, math.inf]
    for _ in range(tries):
        for number, work in enumerate((small, large)):
            least[number] = min(least[number], seconds_of(work))
    return least[1] / least[0]


@functools.cache
def slowness() -> float:
    """How many times as long as on the machine that limits were written on this one computes; at least 1."""
    return max(1.0, min(seconds_of(_reference) for _ in range(5)) / _NOMINAL)


def load_factor() -> float:
    """How much longer everything may take here than on an idle machine of those that limits were written on."""
    return slowness() * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def in_time(limit: float, attempt: Callable[[], float]) -> None:
    """An attempt, which says how many seconds it took, stays below `limit` seconds. What is late is late each time,
    or another process had the machine."""
    taken: list[float] = []
    for _ in range(TRIES):
        taken.append(attempt())
        if taken[-1] < limit * load_factor():
            return
    raise AssertionError(f"{min(taken):.2f} s, where {limit} s times {load_factor():.1f} are allowed")


def _reference() -> int:
    total = 0
    for number in range(100_000):
        total += number % 7
    return total


class QuickLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: where nothing is to be done before the next timer, its clock goes on to that.

    While a thread of its executor works, the clock stands still.
    """

    def __init__(self) -> None:
        self._selector_of_time = _Selector(self)
        self.now = 0.0
        self.num_jobs = 0
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> Any:
        self.num_jobs += 1
        job = super().run_in_executor(executor, func, *args)
        job.add_done_callback(lambda _: setattr(self, "num_jobs", self.num_jobs - 1))
        return job


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: QuickLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or timeout == 0:
            return found
        if timeout is None or self._loop.num_jobs:
            return super().select(None)
        self._loop.now += timeout
        return []


def run_quickly(main: Callable[[], Any]) -> Any:
    """What the coroutine that `main` makes returns, on a `QuickLoop`. What is still running then is cancelled."""
    loop = QuickLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
