"""`qnext serve` as a process: started, asked, signalled."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.forked import Program

ROOT = Path(__file__).parents[2]


class Process:
    """A server that has said that it is ready. `lines` are what it wrote to stderr."""

    def __init__(self, *arguments: object) -> None:
        self.lines: list[str] = []
        self.started = time.perf_counter()
        self.popen = Program(["-m", "qnext", "serve", *arguments, "--port", 0], stderr=subprocess.PIPE)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(180.0) and self.popen.poll() is None, "".join(self.lines)
        self.seconds_to_ready = time.perf_counter() - self.started
        found = re.search(r"ready: (\S+)", "".join(self.lines))
        assert found is not None
        self.url = found[1]

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)
            if line.startswith("try:"):
                self._ready.set()
        self._ready.set()

    def client(self, key: str | None = None) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120.0)

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, seconds: float = 120.0) -> int:
        code = self.popen.wait(seconds)
        self._reader.join(5.0)
        return code

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.wait()


@contextmanager
def process(*arguments: object) -> Iterator[Process]:
    one = Process(*arguments)
    try:
        yield one
    finally:
        one.close()
