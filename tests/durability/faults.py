"""A process that dies, or whose disk fails, at a chosen step: each call that changes what lies on disk is one.

Calls are counted where they reach the system, so no code can forget to announce its own.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qnext.files import folders

# Calls by what they are about: a path, two paths, an open file.
_PATH_CALLS = ("mkdir", "unlink", "remove", "rmdir", "truncate", "chmod", "utime")
_PAIR_CALLS = ("rename", "replace", "link", "symlink")
_FILE_CALLS = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate", "fchmod", "fchown", "sendfile")
_NEED_SPACE = {"open", "write", "pwrite", "writev", "sendfile", "mkdir", "fsync", "fdatasync"}


class Fault(NamedTuple):
    """What happens at step `number`, counted from zero: a SIGKILL, or an error of the system.

    A full disk stays full; any other error comes once.
    """

    number: int
    error: int | None = None

    def strikes(self, number: int, call: str) -> bool:
        if self.error == errno.ENOSPC:
            return number >= self.number and call in _NEED_SPACE
        return number == self.number


class Step(NamedTuple):
    """One call: its name, the file or folder that it is about, and for a rename the name before."""

    call: str
    path: str
    before: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `code` is None where it was killed."""

    code: int | None
    out: str
    err: str
    steps: list[Step]
    fault: Fault | None = None

    @property
    def done(self) -> list[Step]:
        """The steps that came about."""
        return [
            step
            for number, step in enumerate(self.steps)
            if self.fault is None or not self.fault.strikes(number, step.call)
        ]


class Recorder:
    """Counts the steps of this process below `root`, and lets the fault strike."""

    def __init__(self, root: Path, fault: Fault | None, log: Path) -> None:
        self._root = str(root)
        self._fault = fault
        self._count = 0
        self._lock = threading.Lock()
        self._write = os.write
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def install(self) -> None:
        for name in _PATH_CALLS:
            self._wrap(os, name, lambda path, *rest, dir_fd=None, **more: self._at(path, dir_fd))
        for name in _PAIR_CALLS:
            self._wrap(
                os,
                name,
                lambda a, b, *rest, dst_dir_fd=None, **more: self._at(b, dst_dir_fd),
                before=lambda a, b, *rest, src_dir_fd=None, **more: self._at(a, src_dir_fd),
            )
        for name in _FILE_CALLS:
            self._wrap(os, name, lambda file, *rest, **more: self._of(file))
        self._wrap(os, "open", self._opened)
        for module in (builtins, io):
            self._wrap(module, "open", self._opened_as_file)
        self._wrap(folders, "exchange", lambda a, b: str(b), before=lambda a, b: str(a))

    def _wrap(
        self,
        module: Any,
        name: str,
        where: Callable[..., str | None],
        before: Callable[..., str | None] = lambda *rest, **more: None,
    ) -> None:
        call = getattr(module, name)

        def stepping(*args: Any, **options: Any) -> Any:
            path = where(*args, **options)
            if path is not None and (path == self._root or path.startswith(self._root + "/")):
                self._step(name, path, before(*args, **options))
            return call(*args, **options)

        setattr(module, name, stepping)

    def _step(self, call: str, path: str, before: str | None) -> None:
        with self._lock:
            number = self._count
            self._count += 1
            self._write(self._log, (json.dumps([call, path, before]) + "\n").encode())
        if self._fault is not None and self._fault.strikes(number, call):
            if self._fault.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            elif call in ("open", "mkdir", "rename", "replace", "exchange", "unlink", "rmdir"):
                raise OSError(self._fault.error, os.strerror(self._fault.error), path)
            else:
                raise OSError(self._fault.error, os.strerror(self._fault.error))  # as the system: without a path

    def _at(self, path: Any, folder: int | None) -> str | None:
        if isinstance(path, int):
            return self._of(path)
        base = os.getcwd() if folder is None else self._of(folder)
        return os.path.normpath(os.path.join(base or "/", os.fsdecode(path)))

    def _of(self, file: int) -> str | None:
        try:
            return os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            return None

    def _opened(self, path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **more: Any) -> str | None:
        return self._at(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None

    def _opened_as_file(self, path: Any, mode: str = "r", *rest: Any, **more: Any) -> str | None:
        return self._at(path, None) if set(mode) & set("wax") and not isinstance(path, int) else None


def run_child(root: Path, work: Callable[[], object], fault: Fault | None = None) -> Outcome:
    """Fork; the child does `work` with its steps below `root` counted. SystemExit gives the code, as for a verb."""
    beside = root.with_name(root.name + "-seen")
    beside.mkdir(exist_ok=True)
    out, err, log = (beside / name for name in ("out", "err", "steps"))
    child = os.fork()
    if not child:
        code = 1
        try:
            for path, number in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            Recorder(root, fault, log).install()
            work()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    steps = [Step(*json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    return Outcome(code, out.read_text(), err.read_text(), steps, fault)


@contextmanager
def without_exchange() -> Iterator[None]:
    """As on a system that cannot exchange two names at once."""
    exchange = folders.exchange
    folders.exchange = lambda one, other: False
    try:
        yield
    finally:
        folders.exchange = exchange


def lost_by_power(steps: list[Step]) -> list[str]:
    """What could be missing after a power failure though it has its name: data, or the name itself, never flushed."""
    dirty: set[str] = set()
    folders_to_flush: set[str] = set()
    faults: list[str] = []
    for call, path, before in steps:
        if call in ("write", "pwrite", "writev", "sendfile", "ftruncate"):
            dirty.add(path)
        elif call in ("fsync", "fdatasync"):
            dirty.discard(path)
            folders_to_flush.discard(path)
        elif call in ("rename", "replace", "exchange"):
            faults += [f"{path} renamed before {file} was flushed" for file in dirty if _is_at(file, before or "")]
            folders_to_flush.add(str(Path(path).parent))
    return faults + [f"the name in {folder} was never flushed" for folder in sorted(folders_to_flush)]


def _is_at(file: str, place: str) -> bool:
    return file == place or file.startswith(place + "/")
