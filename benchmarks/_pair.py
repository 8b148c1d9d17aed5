"""Two ways of doing one thing, each in a process of its own, timed in turn: A B A B ...

A worker is a function that returns a step to be timed; it runs in a fresh process so that neither side changes the
allocator, threads or caches of the other. Only one process works at a time.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Step = Callable[[], float]
Worker = Callable[..., Step]


def _serve(worker: Worker, arguments: dict[str, Any], connection: Connection) -> None:
    step = worker(**arguments)
    connection.send("ready")
    while connection.recv() == "step":
        start = time.perf_counter()
        value = step()
        connection.send((time.perf_counter() - start, value))


class Contestants:
    """Named workers, each in its own process."""

    def __init__(self, workers: dict[str, tuple[Worker, dict[str, Any]]]) -> None:
        context = mp.get_context("spawn")
        self._ends: dict[str, Connection] = {}
        self._processes = []
        for name, (worker, arguments) in workers.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(worker, arguments, theirs), daemon=True)
            process.start()
            assert ours.recv() == "ready", name
            self._ends[name] = ours
            self._processes.append(process)

    def step(self, name: str) -> tuple[float, float]:
        """(seconds, value) of one step."""
        self._ends[name].send("step")
        return self._ends[name].recv()

    def run(self, *, warmup: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """(seconds, values) by name; values include the warm-up."""
        seconds: dict[str, list[float]] = {name: [] for name in self._ends}
        values: dict[str, list[float]] = {name: [] for name in self._ends}
        for round_ in range(warmup + rounds):
            for name in self._ends:
                duration, value = self.step(name)
                values[name].append(value)
                if round_ >= warmup:
                    seconds[name].append(duration)
        return seconds, values

    def close(self) -> None:
        for end in self._ends.values():
            end.send("stop")
        for process in self._processes:
            process.join()


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """slow / fast round by round: how many times faster the second is."""
    pairs = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return {"median": statistics.median(pairs), "min": pairs[0], "max": pairs[-1]}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
            model = lines[0] if lines else model
    except OSError:
        pass
    return {"cpu": model, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}


def print_json(result: dict[str, Any]) -> None:
    """The last line of every benchmark."""
    print(json.dumps({**result, "machine": machine()}))
