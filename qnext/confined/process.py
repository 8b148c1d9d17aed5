"""The parent's side: it starts a child, asks it, and kills it when it exceeds its limits."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

# The child finds packages where the parent does, and nothing in its working directory.
_START = (
    "import json, runpy, sys; sys.path = json.loads(sys.argv.pop(1)); runpy.run_path(sys.argv[1], None, '__main__')"
)
# Starting an interpreter on a busy machine may take long; it is not the request's fault.
_START_SECONDS = 60.0


@dataclass(frozen=True)
class ConfinedLimits:
    """The limits of one request. `memory_bytes` limits the address space, which includes the program itself."""

    seconds: float  # on the clock
    cpu_seconds: float
    memory_bytes: int
    answer_bytes: int  # of JSON


class ConfinedFailure(Exception):
    """A request exceeded a limit, or broke its process, which has ended. `cause` names the limit.

    `is_spent`: for a limit of time, it was processor time. Otherwise the clock time ran out first, as on a busy
    machine.
    """

    def __init__(self, cause: Literal["time", "memory", "broken"], *, is_spent: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.is_spent = is_spent


class ConfinedProcess:
    """A child process that runs one of qnext's programs. One thread uses it at a time; another may call `interrupt`.

    `program` answers through `child.serve`. `setup` is JSON for its `begin`. The child has no environment, may write no
    file, and ends with its parent. Raises OSError where it does not start.
    """

    def __init__(self, program: Path, limits: ConfinedLimits, *, setup: Mapping[str, Any] | None = None) -> None:
        self._limits = limits
        self._is_interrupted = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps([entry for entry in sys.path if entry]), str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={},
        )
        self._finalizer = weakref.finalize(self, _end_process, self._process)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        deadline = time.monotonic() + _START_SECONDS
        names = ("seconds", "cpu_seconds", "memory_bytes")
        first = {"limits": {name: getattr(limits, name) for name in names}, "setup": dict(setup or {})}
        if not self._write(first, deadline) or not (self._read(deadline) or {}).get("ready"):
            self.kill()
            raise OSError(f"{program.name} did not start in a process of its own")

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Without an answer within the limits, the process is killed and ConfinedFailure is
        raised."""
        deadline = time.monotonic() + self._limits.seconds
        answer = self._read(deadline) if self._write(request, deadline) else None
        if answer is None:
            is_late = time.monotonic() >= deadline
            self.kill()
            code = self._process.returncode
            if code == -signal.SIGABRT:  # how native code ends that gets no memory
                raise ConfinedFailure("memory")
            # A child that spent its processor time was ended by the system.
            is_late = is_late or code in (-signal.SIGPROF, -signal.SIGALRM)
            raise ConfinedFailure("time" if is_late else "broken", is_spent=code == -signal.SIGPROF)
        if answer.get("fault") == "memory":
            self.kill()
            raise ConfinedFailure("memory")
        return answer

    def is_alive(self) -> bool:
        """A process that was interrupted is not, though the system may take a moment to end it."""
        return not self._is_interrupted and self._process.poll() is None

    def kill(self) -> None:
        self._finalizer()

    def interrupt(self) -> None:
        """End the process during another thread's `ask`, which then raises ConfinedFailure and cleans up."""
        self._is_interrupted = True
        self._process.kill()

    def _write(self, value: Any, deadline: float) -> bool:
        data = json.dumps(value).encode("ascii")
        data = struct.pack(">I", len(data)) + data
        stream = self._process.stdin
        assert stream is not None
        view = memoryview(data)
        while view:
            if not _is_ready(stream, select.POLLOUT, deadline):
                return False
            try:
                view = view[os.write(stream.fileno(), view) :]
            except OSError:
                return False
        return True

    def _read(self, deadline: float) -> dict[str, Any] | None:
        head = self._read_bytes(4, deadline)
        if head is None:
            return None
        length = struct.unpack(">I", head)[0]
        if length > self._limits.answer_bytes:  # not ours
            return None
        body = self._read_bytes(length, deadline)
        return None if body is None else json.loads(body)

    def _read_bytes(self, count: int, deadline: float) -> bytes | None:
        stream = self._process.stdout
        assert stream is not None
        data = bytearray()
        while len(data) < count:
            if not _is_ready(stream, select.POLLIN, deadline):
                return None
            chunk = os.read(stream.fileno(), min(count - len(data), 1 << 16))
            if not chunk:
                return None
            data += chunk
        return bytes(data)


def _is_ready(stream: IO[bytes], event: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(stream, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
