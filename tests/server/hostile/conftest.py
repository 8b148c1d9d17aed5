"""One server that all hostile cases are thrown at, and no way out of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qnext.server.access.audit import AuditLog
from qnext.server.access.keys import KeyRing
from qnext.server.limits import Limits
from tests.server.hostile.harness import MAX_MEMORY, Harness, MemoryWatch
from tests.server.serving import running_server

ATTACKER, BYSTANDER, ADMIN = "attacker-key", "bystander-key", "admin-key"


@pytest.fixture(scope="session", autouse=True)
def only_loopback() -> Iterator[list[Any]]:
    """Any connection to elsewhere fails, and fails the suite: the server never asks anybody for anything."""
    tried: list[Any] = []
    usual = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError("no connection to elsewhere in tests")
        usual(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield tried
    assert not tried


@pytest.fixture(scope="package", autouse=True)
def memory(only_loopback: list[Any]) -> Iterator[None]:
    """Whatever comes in, a server of a tiny model stays small: with all tests and what they keep, in one process."""
    watch = MemoryWatch()
    yield
    peak = watch.stop()
    assert peak < MAX_MEMORY, f"{peak >> 20} MiB, last in {watch.when}"


@pytest.fixture(scope="session")
def harness(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    audit_path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    limits = Limits(
        header_seconds=2.0,
        body_seconds=2.0,
        write_seconds=1.5,
        request_seconds=20.0,
        queue_seconds=10.0,
        drain_seconds=1.0,
        watchdog_seconds=600.0,
    )
    keys = KeyRing(plain=[ATTACKER, BYSTANDER], admin=[ADMIN])
    with running_server(chat_model, limits=limits, keys=keys, audit=AuditLog(audit_path)) as running:
        harness = Harness(running, ATTACKER, BYSTANDER, audit_path)
        yield harness
        harness.close()
