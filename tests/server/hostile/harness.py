"""Sends a hostile request and checks what must hold after every one, whatever it was.

I1 no 5xx for a client's fault; I2 an answer in time; I3 /health/live answers all the while; I4 a greedy request of
another key gets the same bytes as ever; I5 blocks, slots and memory come back; I6 errors are small, of the surface's
form, and repeat nothing; I7 one audit line without content.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from qnext.server.access.rates import FailedLogins
from tests.pace import TRIES, load_factor
from tests.server.hostile.cases import Case
from tests.server.hostile.surfaces import MARK, Surface, encoded
from tests.server.serving import Running

LIVE_SECONDS = 0.1
RSS_SLACK = 64 << 20
MAX_ERROR = 4_096
MAX_MEMORY = 1_536 << 20

_LEAKS = re.compile(
    r"0x[0-9a-fA-F]{3,}|Traceback|site-packages|\.py\b|/(?:home|usr|tmp|work|etc|root|proc)/|line \d+, in ",
    re.IGNORECASE,
)
_ids = itertools.count()


class Prober:
    """Asks /health/live over and over on a connection of its own, for as long as the harness lives."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection = socket.create_connection(address, timeout=30.0)
        self._times: list[float] = []  # seconds, since the last `mark`
        self._began: float | None = None  # of the request that is on its way
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prober", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        self._times = []

    def worst(self) -> float:
        """Since the mark, what is on its way included."""
        began = self._began
        late = 0.0 if began is None else time.perf_counter() - began
        return max([*self._times, late])

    def stop(self) -> None:
        self._is_done.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not self._is_done.wait(0.02):
            self._began = time.perf_counter()
            self._connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                part = self._connection.recv(65_536)
                if not part:
                    return
                answer += part
            self._times.append(time.perf_counter() - self._began)
            self._began = None


class MemoryWatch:
    """The most that this process and what computes for it had resident together, looked at four times a second.

    What this process alone had between two looks, the system knows. `when` names the test of the highest look.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # its peak begins anew
        self._peak = 0
        self.when = ""
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes."""
        self._is_done.set()
        self._thread.join()
        alone = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert alone is not None
        return max(self._peak, int(alone[1]) << 10)

    def _run(self) -> None:
        while not self._is_done.wait(0.25):
            now = rss() + sum(map(_resident, _confined_children()))
            if now > self._peak:
                self._peak, self.when = now, os.environ.get("PYTEST_CURRENT_TEST", "")


@dataclass
class Harness:
    running: Running
    attacker: str  # keys
    bystander: str
    audit_path: Path
    baseline: list[Any] = field(default_factory=list)
    rss: int = 0

    def __post_init__(self) -> None:
        host, _, port = self.running.url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.client = self.running.client(self.attacker)
        self.other = self.running.client(self.bystander)
        self.prober = Prober(self.address)
        self.canary()  # the second and later ones read what the first left in the cache
        self.baseline = self.canary()
        self.rss = rss()

    # ---- one case ----

    def check(self, case: Case, surfaces: Sequence[Surface], *, is_last: bool = True) -> None:
        """A case on its surfaces, then all invariants. What is late is tried again before it counts.

        `is_last` false leaves I4 and I5 to a `check_rest` after more cases.
        """
        for surface in surfaces:
            self._check_one(case, surface)
        if is_last:
            self.check_rest()

    def _check_one(self, case: Case, surface: Surface) -> None:
        body = case.body(surface)
        raw = body if isinstance(body, bytes) else encoded(body)
        late = None
        for _ in range(TRIES):
            late = self._try(case, surface, raw)
            if late is None:
                break
        assert late is None, f"{case.name} on {surface.name}: {late}"

    def _try(self, case: Case, surface: Surface, raw: bytes) -> str | None:
        self.prober.mark()
        begin = time.perf_counter()
        answer = self.post(surface, raw)
        seconds = time.perf_counter() - begin
        worst = self.prober.worst()
        where = f"{case.name} on {surface.name}"
        assert answer.status_code in case.statuses, f"{where}: {answer.status_code} {answer.text[:300]}"
        self.check_answer(answer, surface.style, where)
        factor = load_factor()
        if seconds > case.seconds * factor:
            return f"answered after {seconds:.2f} s"
        return f"/health/live took {worst:.3f} s" if worst > LIVE_SECONDS * factor else None

    def post(self, surface: Surface, raw: bytes, **headers: str) -> httpx2.Response:
        number = f"case-{next(_ids)}"
        sent = {"Content-Type": "application/json", "X-Request-Id": number, **headers}
        answer = self.client.post(surface.path, content=raw, headers=sent)
        assert answer.headers["x-request-id"] == number
        if surface.route.audit != "refusals" or answer.status_code >= 400:
            self.check_audit(number, answer.status_code)
        return answer

    # ---- the invariants ----

    def check_answer(self, answer: httpx2.Response, style: str, where: str) -> None:
        """I1 and I6."""
        assert answer.status_code < 500, f"{where}: {answer.status_code} {answer.text[:300]}"
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/json", where
            check_error(answer.content, style, where)

    def check_audit(self, request_id: str, status: int) -> None:
        """I7. The line is written when the request has ended, a moment after its answer."""
        lines: list[dict[str, Any]] = []
        for _ in range(200):
            lines = [line for line in self.audit_lines() if line["request_id"] == request_id]
            if lines:
                break
            time.sleep(0.005)
        assert [line["status"] for line in lines] == [status], lines
        assert MARK not in json.dumps(lines)

    def audit_lines(self, last: int = 8_192) -> list[dict[str, Any]]:
        """Those in the last bytes of the audit log; the end of one that is being written is none yet."""
        with self.audit_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - last))
            lines = file.read().split(b"\n")[:-1]
        return [json.loads(line) for line in (lines if size <= last else lines[1:])]

    def check_rest(self, slack: int = RSS_SLACK) -> None:
        """I4 and I5: what the others have of the server is what they had before, memory to within `slack` bytes."""
        self.check_idle()
        assert self.canary() == self.baseline, "another key's answer has changed"
        if rss() > self.rss + slack:
            release_memory()
            assert rss() <= self.rss + slack, f"{(rss() - self.rss) >> 20} MiB more than before"
        self.rss = rss()

    def check_idle(self, seconds: float = 10.0) -> None:
        """No request is left anywhere; blocks and slots are free or cached."""
        end = time.monotonic() + seconds
        while (left := self.left_over()) and time.monotonic() < end:
            time.sleep(0.005)
        assert not left, left

    def left_over(self) -> dict[str, int]:
        gauges, server = self.running.gauges(), self.running.server
        found = {
            "running": gauges.num_running,
            "waiting": gauges.num_waiting,
            "slots": gauges.num_slots_running,
            "blocks": gauges.num_blocks_used - gauges.num_blocks_cached,
            "queued": server.worker.num_queued,
            "tasks": len(server.tasks),
            "active": len(server.active),
        }
        return {name: count for name, count in found.items() if count}

    def canary(self) -> list[Any]:
        body = {"prompt": "The canary sings", "max_tokens": 5, "temperature": 0, "logprobs": 2}
        answer = self.other.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"])

    def close(self) -> None:
        self.prober.stop()
        self.client.close()
        self.other.close()

    def forgive(self) -> None:
        """Forget the wrong keys that were tried."""
        self.running.call(lambda: setattr(self.running.server, "logins", FailedLogins()))

    def aborted(self) -> int:
        return sum(self.running.server.counters.aborts.counts.values())


def check_error(body: bytes, style: str, where: str) -> None:
    assert len(body) <= MAX_ERROR, where
    value = json.loads(body)
    if style == "anthropic":
        assert value["type"] == "error" and set(value["error"]) == {"type", "message"}, where
    else:
        assert set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}, where
    assert value["error"]["message"] and value["error"]["type"], where
    text = body.decode()
    assert MARK not in text.lower(), f"{where} repeats the input: {text}"
    assert not _LEAKS.search(text), f"{where} says too much: {text}"


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _children() -> list[int]:
    """Processes that this one started and that have not ended."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def _confined_children() -> list[int]:
    """Those that compute for a server in this process: `qnext.confined` starts them so."""
    found: list[int] = []
    for process in _children():
        with contextlib.suppress(OSError):
            if b"_worker.py" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # it has ended


def release_memory() -> None:
    """Give back what the allocator keeps, so that only what is held counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
