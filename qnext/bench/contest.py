"""Several ways of doing one thing, each in a process of its own, timed in turn: A B A B ...

A worker is a function that returns a step to be timed. It runs in a fresh process, so that no side changes the
allocator, threads or caches of another. Only one process works at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from qnext.errors import DoesNotFit, QnextError
from qnext.planning.machine import processor, total_bytes

Step = Callable[..., Any]
Worker = Callable[..., Step]


def _serve(worker: Worker, arguments: dict[str, Any], connection: Connection) -> None:
    try:
        step = worker(**arguments)
        connection.send("ready")
        while (wanted := connection.recv()) is not None:
            start = time.perf_counter()
            value = step(*wanted)
            connection.send((time.perf_counter() - start, value))
    except QnextError as error:
        connection.send(error)
    except (KeyboardInterrupt, EOFError):  # the parent stopped too, or is gone
        pass
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


class Contestants:
    """Named workers, each in a process of its own. An error of a worker is raised here; DoesNotFit when a worker was
    killed."""

    def __init__(self, workers: dict[str, tuple[Worker, dict[str, Any]]]) -> None:
        context = mp.get_context("spawn")
        self._ends: dict[str, Connection] = {}
        self._processes: list[Any] = []
        try:
            for name, (worker, arguments) in workers.items():
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(worker, arguments, theirs), daemon=True)
                process.start()
                theirs.close()  # so that its end is seen when the process dies
                self._ends[name] = ours
                self._processes.append(process)
                self._receive(name)
        except BaseException:
            self.close()
            raise

    def step(self, name: str, *arguments: Any) -> tuple[float, Any]:
        """(seconds, value) of one step."""
        self._ends[name].send(arguments)
        return self._receive(name)

    def run(self, *, warmup: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
        """(seconds, values) by name; values include the warm-up."""
        seconds: dict[str, list[float]] = {name: [] for name in self._ends}
        values: dict[str, list[Any]] = {name: [] for name in self._ends}
        for round_ in range(warmup + rounds):
            for name in self._ends:
                duration, value = self.step(name)
                values[name].append(value)
                if round_ >= warmup:
                    seconds[name].append(duration)
        return seconds, values

    def close(self) -> None:
        for end in self._ends.values():
            with contextlib.suppress(OSError):  # it has ended already
                end.send(None)
            end.close()
        for process in self._processes:
            process.join()

    def __enter__(self) -> Contestants:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, name: str) -> Any:
        try:
            answer = self._ends[name].recv()
        except (EOFError, ConnectionResetError):
            raise DoesNotFit(f"{name} ended without an answer; it was killed, perhaps for lack of memory") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """slow / fast, round by round: how many times as fast the second is."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def machine() -> dict[str, Any]:
    """The machine of the measurement: name and generation of the CPU, cores, features that kernels use, bytes of
    memory."""
    cpu = processor()
    facts = {"cpu": cpu.name, "generation": cpu.generation, "cores": cpu.num_cores, "features": list(cpu.features)}
    return {**facts, "memory_bytes": total_bytes()}
