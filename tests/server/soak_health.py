"""A process that asks a server for its health all the while, and another server, which does nothing, beside it.

python -m tests.server.soak_health HOST PORT asks until its input ends; the last line of its output is what it saw.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

_EVERY = 0.025  # seconds
_NEAR = 0.15  # seconds, between an answer of the server and those of the other that count beside it
_ANSWER = b'{"status":"ok"}'
_ROOT = Path(__file__).parents[2]


@dataclass
class Pulse:
    """When it was asked, and seconds that the answer took, of the server and of the one that does nothing."""

    server: list[tuple[float, float]] = field(default_factory=list)
    idle: list[tuple[float, float]] = field(default_factory=list)

    def own(self) -> list[float]:
        """What the server took beyond the machine: each answer less the slowest of the other's around that time."""
        asked, idle = np.array(self.server), np.array(self.idle)
        first = np.searchsorted(idle[:, 0], asked[:, 0] - _NEAR)
        last = np.searchsorted(idle[:, 0], asked.sum(1) + _NEAR)
        near = [idle[a:b, 1].max(initial=0.0) for a, b in zip(first, last, strict=True)]
        return [max(0.0, took - other) for (_, took), other in zip(self.server, near, strict=True)]

    def figures(self) -> dict[str, float]:
        """Milliseconds; of the server, of the other ("machine"), and what is left when that is taken off ("own")."""
        kinds = {"": [s for _, s in self.server], "machine ": [s for _, s in self.idle], "own ": self.own()}
        found = {"number": float(len(self.server))}
        for kind, seconds in kinds.items():
            values = 1000 * np.array(seconds)
            found |= {f"{kind}p{part}": float(np.percentile(values, part)) for part in (50, 99)}
            found[f"{kind}max"] = float(values.max())
        return found


def start_watching(url: str) -> subprocess.Popen[str]:
    """The process, when it has begun to ask."""
    host, _, port = url.removeprefix("http://").partition(":")
    command = [sys.executable, "-m", "tests.server.soak_health", host, port]
    one = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
    assert one.stdout is not None and one.stdout.readline() == "ready\n"
    return one


def stop_watching(one: subprocess.Popen[str]) -> Pulse:
    """What it saw. Raises RuntimeError where the server ended its connection, or answered something else."""
    output, _ = one.communicate(timeout=90.0)
    if one.returncode:
        raise RuntimeError("the server ended a connection that asked for its health")
    return Pulse(**json.loads(output))


def _serve_idle(listening: socket.socket) -> None:
    one, _ = listening.accept()
    while one.recv(4_096):
        one.sendall(_ANSWER)


def _ask(one: socket.socket, found: list[tuple[float, float]], is_done: threading.Event) -> None:
    while not is_done.wait(_EVERY):
        began = time.monotonic()
        one.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(_ANSWER):
            part = one.recv(65_536)
            if not part:
                sys.stdout.flush()
                os._exit(1)
            answer += part
        found.append((began, time.monotonic() - began))


def main() -> None:
    pulse, is_done = Pulse(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if os.fork() == 0:
            _serve_idle(listening)
            os._exit(0)
        address = listening.getsockname()
    connections = [socket.create_connection(where, 60.0) for where in ((sys.argv[1], int(sys.argv[2])), address)]
    # A thread for each: while the server is slow, the machine is asked all the same.
    threads = [
        threading.Thread(target=_ask, args=(one, found, is_done))
        for one, found in zip(connections, (pulse.server, pulse.idle), strict=True)
    ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    is_done.set()
    for thread in threads:
        thread.join()
    print(json.dumps(asdict(pulse)))


if __name__ == "__main__":
    main()
