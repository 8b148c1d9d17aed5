"""What the heap keeps free goes back to the system, at the right times, and its arenas are few."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qnext.server import heap
from tests.pace import run_quickly
from tests.server.hostile.harness import rss
from tests.server.serving import running_server

ARENAS = """
import ctypes, threading
from qnext.server import heap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
assert not {bounded} or heap.bound_arenas()
gate = threading.Barrier(6)
def work():
    gate.wait()
    for _ in range(20_000):
        libc.malloc(200)
threads = [threading.Thread(target=work) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
file = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fflush(ctypes.c_void_p(file))
"""


def test_holes_of_the_heap_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size, number = 24 << 10, 3_000  # less than what malloc maps apart
    parts = [libc.malloc(size) for _ in range(number)]
    for part in parts:
        ctypes.memset(ctypes.c_void_p(part), 1, size)
    for index, part in enumerate(parts):
        if index % 10:
            libc.free(ctypes.c_void_p(part))
    before = rss()
    assert heap.trim()
    given = before - rss()
    for part in parts[::10]:
        libc.free(ctypes.c_void_p(part))
    assert given > size * number / 2


def test_arenas_are_few() -> None:
    def arenas(bounded: bool) -> int:
        command = [sys.executable, "-c", ARENAS.format(bounded=bounded)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.count("<heap nr=")

    assert arenas(False) > 2 >= arenas(True)


def test_it_is_trimmed_after_the_last_request_and_now_and_then_between(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[threading.Thread] = []
    monkeypatch.setattr(heap, "trim", lambda: trims.append(threading.current_thread()))
    busy = False

    async def seconds(number: float) -> int:
        """How often it is trimmed meanwhile."""
        before = len(trims)
        await asyncio.sleep(number)
        return len(trims) - before

    async def run() -> None:
        nonlocal busy
        keeping = asyncio.ensure_future(heap.keep_trimmed(lambda: busy))
        assert [await seconds(4.5), await seconds(60.0)] == [0, 1]  # what the start left, once
        busy = True
        assert await seconds(175.0) == 3
        busy = False
        assert [await seconds(number) for number in (3.0, 5.0, 600.0)] == [0, 1, 0]
        assert not keeping.done()

    run_quickly(run)
    assert threading.main_thread() not in trims  # the event loop goes on meanwhile


def test_a_server_keeps_its_heap_trimmed(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    async def keep_trimmed(is_busy: Callable[[], bool]) -> None:
        while True:
            asked.append(is_busy())
            await asyncio.sleep(0.002)

    monkeypatch.setattr(heap, "keep_trimmed", keep_trimmed)
    with running_server(chat_model) as running, running.client() as client:
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 200, "ignore_eos": True})
    assert True in asked and False in asked
