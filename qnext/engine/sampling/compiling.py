"""Who compiles what when: jobs of many owners in turn, each in a child process that can be killed.

An owner may use all processes but one, and a part of the waiting line. So whatever one owner sends, the next job of
another waits for one process to come free at most, and no longer than a job may last.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.confined.process import ConfinedFailure, ConfinedLimits, ConfinedProcess
from qnext.engine.sampling.constraint import GrammarLimits
from qnext.errors import UsageError

_STACK_BYTES = 64 << 20  # the library recurses along rules
_STACK_LOCK = threading.Lock()  # the size holds for the next threads of the whole process
_ANSWER_BYTES = 16 << 20


class CompilersBusy(Exception):
    """The constraint may be good, but was not compiled: the line is full, or the machine too busy.

    `is_own`: the full part of the line is the owner's own.
    """

    def __init__(self, message: str, *, is_own: bool = False) -> None:
        super().__init__(message)
        self.is_own = is_own


@dataclass(eq=False)
class Job:
    owner: str
    run: Callable[[], None]


class CompileLine:
    """Runs jobs on `limits.compile_processes` threads that live while there is work. For any number of threads."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by owner, the next owner first
        self._num_waiting = 0
        self._running: Counter[str] = Counter()  # by owner
        self._num_threads = 0
        self._is_closed = False

    def submit(self, job: Job) -> None:
        """Raises CompilersBusy where the line, or the owner's part of it, is full."""
        limits = self._limits
        with self._lock:
            if self._is_closed:
                raise CompilersBusy("output constraints are no longer compiled")
            if len(self._waiting.get(job.owner, ())) >= limits.max_waiting_per_owner:
                raise CompilersBusy("too many of your output constraints wait to be compiled", is_own=True)
            if self._num_waiting >= limits.max_waiting:
                raise CompilersBusy("too many output constraints wait to be compiled")
            self._waiting.setdefault(job.owner, deque()).append(job)
            self._num_waiting += 1
            starts = self._num_threads < limits.compile_processes
            self._num_threads += starts
        if starts:
            self._start_thread()

    def withdraw(self, job: Job) -> bool:
        """Whether the job was still waiting, and will not run."""
        with self._lock:
            queue = self._waiting.get(job.owner)
            if queue is None or job not in queue:
                return False
            queue.remove(job)
            self._num_waiting -= 1
            if not queue:
                del self._waiting[job.owner]
            return True

    def close(self) -> list[Job]:
        """Take no more jobs; those that waited come back and will not run."""
        with self._lock:
            self._is_closed = True
            left = [job for queue in self._waiting.values() for job in queue]
            self._waiting.clear()
            self._num_waiting = 0
            return left

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="grammar-compiler", daemon=True)
        with _STACK_LOCK:
            usual = threading.stack_size(_STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(usual)

    def _work(self) -> None:
        while True:
            with self._lock:
                job = self._next()
                if job is None:
                    self._num_threads -= 1
                    return
                self._running[job.owner] += 1
            try:
                job.run()
            finally:
                with self._lock:
                    self._running[job.owner] -= 1
                    if not self._running[job.owner]:
                        del self._running[job.owner]

    def _next(self) -> Job | None:
        """The next job of the first owner that has less than its part of the processes."""
        most = max(1, self._limits.compile_processes - 1)
        owner = next((owner for owner in self._waiting if self._running[owner] < most), None)
        if owner is None:
            return None
        queue = self._waiting[owner]
        job = queue.popleft()
        self._num_waiting -= 1
        if queue:
            self._waiting.move_to_end(owner)
        else:
            del self._waiting[owner]
        return job


class CompilerProcesses:
    """The children that compile: started when needed, used again, replaced when they broke.

    For any number of threads.
    """

    def __init__(self, program: Path, limits: GrammarLimits, setup: Callable[[], Mapping[str, Any]]) -> None:
        self._program = program
        self._limits = limits
        self._setup = setup
        self._lock = threading.Lock()
        self._idle: list[ConfinedProcess] = []
        self._busy: set[ConfinedProcess] = set()
        self._is_closed = False

    def warm(self) -> None:
        """Start a process where there may be one more, so that no constraint waits for it. Never raises."""
        with self._lock:
            if self._is_closed or len(self._idle) + len(self._busy) >= self._limits.compile_processes:
                return
        with contextlib.suppress(CompilersBusy):  # whoever needs one will be told
            self._give_back(self._started())

    def ask(self, request: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
        """The child's answer. Raises UsageError for a constraint that costs too much, and CompilersBusy for one of
        which that is not known. A child that is gone or worn is replaced before this returns, at its owner's cost."""
        for is_last in (False, True):
            process = self._taken()
            try:
                answer = process.ask(request)
            except ConfinedFailure as failure:
                self._drop(process)
                if failure.cause == "broken" and not is_last:
                    continue  # not by this constraint, perhaps
                self.warm()
                raise self._refusal(failure, kind) from None
            if answer.get("is_worn"):
                self._drop(process)
                self.warm()
            else:
                self._give_back(process)
            return answer
        raise AssertionError

    def close(self) -> None:
        """End all children, also those that compile."""
        with self._lock:
            self._is_closed = True
            idle, busy = list(self._idle), list(self._busy)
            self._idle.clear()
        for process in busy:
            process.interrupt()
        for process in idle:
            process.kill()

    @property
    def num_processes(self) -> int:
        with self._lock:
            return len(self._idle) + len(self._busy)

    def _refusal(self, failure: ConfinedFailure, kind: str) -> Exception:
        limits = self._limits
        if self._is_closed or (failure.cause == "time" and not failure.is_spent):
            return CompilersBusy("the machine is too busy to compile output constraints")
        if failure.cause == "time":
            return UsageError(f"{kind}: takes more than {limits.compile_cpu_seconds:g} s of processor time to compile")
        if failure.cause == "memory":
            return UsageError(f"{kind}: takes more than {limits.compile_memory_bytes >> 20} MiB of memory to compile")
        return UsageError(f"{kind}: cannot be compiled: it breaks the compiler")

    def _taken(self) -> ConfinedProcess:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.is_alive():
                    self._busy.add(process)
                    return process
        return self._started()

    def _started(self) -> ConfinedProcess:
        limits = self._limits
        confined = ConfinedLimits(
            seconds=limits.compile_seconds,
            cpu_seconds=limits.compile_cpu_seconds,
            memory_bytes=limits.process_memory_bytes,
            answer_bytes=_ANSWER_BYTES,
        )
        if self._is_closed:
            raise CompilersBusy("output constraints are no longer compiled")
        try:
            process = ConfinedProcess(self._program, confined, setup=self._setup())
        except OSError:
            raise CompilersBusy("the process that compiles output constraints did not start") from None
        with self._lock:
            self._busy.add(process)
            is_closed = self._is_closed
        if is_closed:
            self._drop(process)
            raise CompilersBusy("output constraints are no longer compiled")
        return process

    def _give_back(self, process: ConfinedProcess) -> None:
        with self._lock:
            self._busy.discard(process)
            if not self._is_closed:
                self._idle.append(process)
                return
        process.kill()

    def _drop(self, process: ConfinedProcess) -> None:
        with self._lock:
            self._busy.discard(process)
        process.kill()
