"""Runs `qnext` commands and kills some. A program of its own: it imports what they need, and never computes itself.

Reads JSON lines `[file or null, lines, seconds, argument, ...]` and answers each with the exit code, null where it was
killed: so many seconds after the file had so many lines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
import torch._dynamo

import qnext.cli.terminal.training
import qnext.recipes.tasks
from qnext.cli import main

# What every command needs; torch imports its compiler when it makes the first optimiser.
IMPORTED = (qnext.cli.terminal.training, qnext.recipes.tasks, torch._dynamo)


def run(file: str | None, lines: int, seconds: float, arguments: list[str]) -> int | None:
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        torch.set_num_threads(1)
        try:
            main(arguments)
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        os._exit(1)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if file is not None and lines_of(file) >= lines:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.001)


def lines_of(file: str) -> int:
    try:
        with open(file, "rb") as opened:
            return opened.read().count(b"\n")
    except OSError:
        return -1


if __name__ == "__main__":
    for line in sys.stdin:
        file, lines, seconds, *arguments = json.loads(line)
        print(json.dumps(run(file, lines, seconds, arguments)), flush=True)
