"""Answers of a server as they arrive, read by as little as can be: what a library of HTTP costs is not the server's."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qnext.bench.contest import spread

_TOKEN = b'"text":'  # stands once in the event of each token


@dataclass
class Answer:
    """What came, and when: (seconds of time.monotonic, bytes)."""

    pieces: list[tuple[float, bytes]]

    @property
    def tokens(self) -> list[float]:
        """When each token of a stream came; for a whole answer once, when it began to."""
        return [when for when, piece in self.pieces for _ in range(piece.count(_TOKEN))]


class _Reader(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self.request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.is_done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_done.set_result(None)


def _request(body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {len(raw)}", "", ""]).encode() + raw


async def ask(url: str, prompt: Sequence[int], max_tokens: int, *, stream: bool = True) -> Answer:
    """One greedy completion on a connection of its own."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": stream}
    host, _, port = url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    _, reader = await loop.create_connection(lambda: _Reader(_request(body)), host, int(port))
    await reader.is_done
    if not reader.pieces or b" 200 " not in reader.pieces[0][1].split(b"\r\n", 1)[0]:
        raise SystemExit(b"".join(piece for _, piece in reader.pieces).decode())
    return Answer(reader.pieces)


async def ask_together(
    url: str, prompts: Sequence[Sequence[int]], max_tokens: int, *, stream: bool = True
) -> list[Answer]:
    return await asyncio.gather(*(ask(url, prompt, max_tokens, stream=stream) for prompt in prompts))


def small_requests(url: str, number: int) -> list[float]:
    """Seconds of each of many small requests on one kept connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    seconds = []
    with socket.create_connection((host, int(port)), timeout=60.0) as one:
        for _ in range(number):
            began = time.perf_counter()
            one.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += one.recv(65_536)
            seconds.append(time.perf_counter() - began)
    return seconds


def delays(answers: Sequence[Answer], engine: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Milliseconds that answers, streamed in this order, came behind the engine's tokens of the same requests.

    "first": of first tokens; "token": of all; "gap": how far each gap between two tokens is from the engine's.
    """
    found: dict[str, list[float]] = {"first": [], "token": [], "gap": []}
    for answer, made in zip(answers, engine, strict=True):
        behind = 1000 * (np.array(answer.tokens)[: len(made)] - np.array(made))
        found["first"].append(float(behind[0]))
        found["token"] += behind.tolist()
        found["gap"] += np.abs(np.diff(behind)).tolist()
    return found


def tail(values: Sequence[float]) -> dict[str, float]:
    """Their spread, and the value that one in a hundred exceeds."""
    return {**spread(list(values)), "p99": float(np.percentile(values, 99))}
