"""What was measured for the claims, point by point: written as it comes, and never measured twice."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qnext.bench.contest import machine
from qnext.errors import CorruptCheckpoint
from qnext.files import append


class Point(NamedTuple):
    """One measurement. `facts` say what was measured, as a JSON object: a point with other facts is another one."""

    name: str
    facts: dict[str, Any]
    measure: Callable[[], Any]  # a JSON value


class Measured(NamedTuple):
    """A measured point, the machine and the day."""

    value: Any
    machine: dict[str, Any]
    date: str


class Notebook:
    """The points of a folder, in `points.jsonl`. Several processes may write to it.

    `seconds` is for how long new measurements may begin; None: until all are done. `say` is told which one begins.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "points.jsonl"
        self._say, self._clock = say, clock
        self._end = None if seconds is None else clock() + seconds
        self._entries: dict[str, Measured] = {}

    def fill(self, points: Iterable[Point]) -> dict[str, Measured]:
        """Measure what is missing, as long as there is time; return what is known then, by name."""
        points = list(points)
        known = self.known(points)
        for point in points:
            if point.name in known:
                continue
            if self._end is not None and self._clock() >= self._end:
                break
            with self._alone(point.name) as is_alone:
                self._read()
                if not is_alone or _key(point) in self._entries:
                    continue  # another process is at it, or was
                self._say(point.name)
                self._write(point, point.measure())
        return self.known(points)

    def known(self, points: Iterable[Point]) -> dict[str, Measured]:
        """Those of the points that were measured, by name."""
        self._read()
        found = ((point.name, self._entries.get(_key(point))) for point in points)
        return {name: entry for name, entry in found if entry is not None}

    def _read(self) -> None:
        self._entries.clear()
        if not self._path.exists():
            return
        for number, line in enumerate(self._path.read_bytes().split(b"\n"), 1):
            try:
                found = json.loads(line)
            except ValueError:
                continue  # cut off by a kill, and measured again
            try:
                key = json.dumps([found["point"], found["facts"]], sort_keys=True)
                self._entries[key] = Measured(found["value"], found["machine"], found["date"])
            except (KeyError, TypeError):
                raise CorruptCheckpoint(f"{self._path}: line {number} is no measured point; remove it") from None

    def _write(self, point: Point, value: Any) -> None:
        line = {"point": point.name, "facts": point.facts, "value": value, "machine": machine()}
        line["date"] = time.strftime("%Y-%m-%d")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            append(descriptor, b"\n" * is_cut + json.dumps(line).encode() + b"\n", path=self._path)
        finally:
            os.close(descriptor)
        self._read()

    @contextmanager
    def _alone(self, name: str) -> Iterator[bool]:
        """Whether no other process is measuring this point."""
        path = self.folder / "locks" / name.replace("/", "-")
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield _is_locked(descriptor)
        finally:
            os.close(descriptor)


def _key(point: Point) -> str:
    """Names and facts as JSON has them: a tuple is a list there."""
    return json.dumps([point.name, point.facts], sort_keys=True)


def _is_locked(descriptor: int) -> bool:
    """Whether the file is now ours; the lock ends with the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
