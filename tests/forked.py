"""Python programs for tests in processes of their own, which need not import torch again.

A process imports what is heavy, once for a test run, and each program is a fork of it: torch takes two seconds of a
processor. Nothing of qnext is among that, so a program begins as one of a shell does, with its own variables, folder
and streams. What is about the start itself (imports, variables that libraries read when they are loaded, memory) starts
an interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import IO

ROOT = Path(__file__).parents[1]


def context() -> ForkServerContext:
    """Processes of multiprocessing that are such forks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    return found


class Program:
    """What `subprocess.Popen` starts with text streams, as far as tests use it.

    `words` follow the interpreter's name: `-m MODULE ARGUMENTS`, `-c CODE ARGUMENTS` or `FILE ARGUMENTS`. Streams that
    are not piped are those of the test.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        ours: list[int | None] = []
        theirs: list[Connection] = []
        for number, wanted in enumerate((stdin, stdout, stderr)):
            is_input = number == 0
            if wanted == subprocess.PIPE:
                read, write = os.pipe()
                ours.append(write if is_input else read)
                theirs.append(_carried(read if is_input else write))
            else:
                ours.append(None)
                of_test = os.open(os.devnull, os.O_RDWR) if wanted == subprocess.DEVNULL else os.dup(number)
                theirs.append(_carried(of_test))
        self.args = [sys.executable, *map(str, words)]
        environment = dict(os.environ if env is None else env)
        place = str(Path.cwd() if cwd is None else cwd)
        self._process = context().Process(target=_run, args=(self.args[1:], environment, place, theirs))
        self._process.start()
        for each in theirs:
            each.close()
        self.stdin, self.stdout, self.stderr = (
            None if each is None else os.fdopen(each, mode, encoding="utf-8")
            for each, mode in zip(ours, ("w", "r", "r"), strict=True)
        )

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote until it ended."""
        end = None if timeout is None else time.monotonic() + timeout
        said = {"stdout": "", "stderr": ""}

        def read(name: str, stream: IO[str]) -> None:
            with stream:
                said[name] = stream.read()

        readers = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr))
            if stream is not None
        ]
        for reader in readers:
            reader.start()
        if self.stdin is not None:
            with self.stdin:
                self.stdin.write(text or "")
        for reader in readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if end is None else max(0.1, end - time.monotonic()))
        return said["stdout"], said["stderr"]

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    words: Sequence[object],
    *,
    text: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """A program that ends by itself, and what it wrote."""
    pipe = subprocess.PIPE
    program = Program(words, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd=cwd)
    try:
        out, err = program.communicate(text, timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(program.args, program.wait(), out, err)


def _carried(descriptor: int) -> Connection:
    """A descriptor in what multiprocessing sends to the process that forks. It closes it in the end."""
    return Connection(descriptor)


def _run(words: list[str], environment: dict[str, str], place: str, streams: list[Connection]) -> None:
    """In the fork: becomes the program. An exit code that it gives is the process's."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    kind, *arguments = words
    beside = "" if kind in ("-m", "-c") else str(Path(kind).parent)
    sys.path[:0] = [beside, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-m":
        sys.argv = [arguments[0], *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")
