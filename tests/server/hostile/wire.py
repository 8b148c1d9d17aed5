"""Hostile bytes on a connection, what is sent, which answers are right, and how they are read."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass

KEY = "attacker-key"
AUTH = f"Authorization: Bearer {KEY}\r\n"
VALID = b'{"prompt":"Hi","max_tokens":2,"temperature":0}'
CLOSED = 0  # closed without an answer


@dataclass(frozen=True)
class Bytes:
    """`parts` are sent one after another; a number is a pause in seconds. `statuses` are right for the first answer,
    `num_answers` how many there may be. `closes`: the server ends the connection within `seconds`."""

    name: str
    parts: tuple[bytes | float, ...]
    statuses: tuple[int, ...] = (400,)
    num_answers: int = 1
    closes: bool = False
    seconds: float = 1.0
    half_closes: bool = False
    is_heavy: bool = False


def get(target: str = "/health/live", headers: str = "", version: str = "HTTP/1.1") -> bytes:
    return f"GET {target} {version}\r\nHost: localhost\r\n{headers}\r\n".encode("latin-1")


def post(body: bytes = VALID, headers: str = "", path: str = "/v1/completions", length: bool = True) -> bytes:
    size = f"Content-Length: {len(body)}\r\n" if length else ""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{AUTH}{size}{headers}\r\n"
    return head.encode("latin-1") + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def talk(address: tuple[str, int], case: Bytes) -> tuple[bytes, bool, float]:
    """(what came back, whether the server closed, seconds after the last byte was sent)."""
    received = b""
    with socket.create_connection(address, timeout=10.0) as one:
        is_closed = False
        try:
            for part in case.parts:
                if isinstance(part, float):
                    time.sleep(part)
                    received += _present(one)
                else:
                    one.sendall(part)
            if case.half_closes:
                one.shutdown(socket.SHUT_WR)
        except OSError:
            is_closed = True
        begin = time.monotonic()
        one.settimeout(0.05)
        while not (is_closed and not received) and time.monotonic() - begin < 2 * case.seconds + 10.0:
            try:
                part = one.recv(1 << 20)
            except TimeoutError:
                if is_complete(received, case):
                    break
                continue
            except OSError:
                part = b""
            if not part:
                is_closed = True
                break
            received += part
            if is_complete(received, case):
                break
    return received, is_closed, time.monotonic() - begin


def _present(one: socket.socket) -> bytes:
    """What has come already: a reset would take it away."""
    try:
        return one.recv(1 << 20, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def is_complete(received: bytes, case: Bytes) -> bool:
    """Whether all has come that there is to wait for."""
    return not case.closes and len(bodies(received)) >= case.num_answers


def bodies(received: bytes) -> list[bytes]:
    """Of the answers that are there whole."""
    found: list[bytes] = []
    while True:
        head, end, rest = received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if not end or len(rest) < size:
            return found
        found.append(rest[:size])
        received = rest[size:]


def statuses(received: bytes) -> list[int]:
    return [int(found) for found in _STATUS.findall(received)]
