"""A server process that measures how long its event loop stands still. Run as a module: FOLDER, then lines on stdin.

Each line on stdin is answered by a line of JSON on stdout: the longest pause since the last one, and memory.

A machine that does other work makes every clock late. So a pause is what the process itself is to blame for: the time
between two beats of the loop, without the time that the loop's thread waited for a processor, and no more than the
processor time that all threads of the process spent meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from qnext.server.access.keys import KeyRing
from qnext.server.limits import Limits
from qnext.server.run import Listen, Urls, serve
from qnext.server.server import Server
from tests.server.serving import load_engine

KEYS = ["attacker-key", "bystander-key"]
_BEAT = 0.002
_SUSPECT = 0.025  # a pause of which the threads' places are told


class Monitor:
    """Beats in the event loop. What holds the interpreter's lock delays a beat as what runs in the loop does."""

    def __init__(self) -> None:
        self._own = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._worst: dict[str, Any] = {"pause": 0.0, "wall": 0.0}
        self._beat = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()
        self._places: list[str] = []

    async def run(self) -> None:
        delay, spent = self._waited(), time.process_time()
        while True:
            self._beat = begin = time.perf_counter()
            await asyncio.sleep(_BEAT)
            wall = time.perf_counter() - begin - _BEAT
            new_delay, new_spent = self._waited(), time.process_time()
            pause = max(0.0, min(wall - (new_delay - delay), new_spent - spent))
            delay, spent = new_delay, new_spent
            if pause > self._worst["pause"]:
                self._worst = {"pause": pause, "wall": wall}
                if pause > _SUSPECT:
                    self._worst["places"] = self._places
            self._worst["wall"] = max(self._worst["wall"], wall)

    def read(self) -> dict[str, Any]:
        """The worst since the last reading, and memory in bytes at its highest, of this process."""
        found, self._worst = self._worst, {"pause": 0.0, "wall": 0.0}
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {**found, "peak": int(status["VmHWM"].split()[0]) << 10, "now": int(status["VmRSS"].split()[0]) << 10}

    def _waited(self) -> float:
        """Seconds that the loop's thread was ready and had no processor."""
        return int(Path(self._own).read_text().split()[1]) * 1e-9

    def _watch(self) -> None:
        """Where the threads are when a beat is late."""
        own = threading.get_ident()
        while True:
            time.sleep(_SUSPECT / 2)
            if time.perf_counter() - self._beat > _SUSPECT:
                frames = [frame for ident, frame in sys._current_frames().items() if ident != own]
                self._places = [" < ".join(_lines(frame)) for frame in frames]


def _lines(frame: Any) -> list[str]:
    found = traceback.extract_stack(frame)[-5:][::-1]
    return [f"{Path(line.filename).name}:{line.lineno} {line.name}" for line in found]


def main(folder: str) -> None:
    def new_server() -> Server:
        loop = asyncio.get_running_loop()
        monitor = Monitor()
        tasks.append(asyncio.ensure_future(monitor.run()))
        loop.add_reader(
            sys.stdin.fileno(), lambda: (sys.stdin.readline(), print(json.dumps(monitor.read()), flush=True))
        )
        limits = Limits(body_seconds=60.0, drain_seconds=1.0, watchdog_seconds=600.0)
        return Server(limits=limits, keys=KeyRing(plain=KEYS))

    tasks: list[asyncio.Future[None]] = []
    serve(new_server, lambda: load_engine(Path(folder)), Listen(port=0), on_ready=_tell)


def _tell(server: Server, urls: Urls) -> None:
    print(json.dumps({"url": urls.public}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
