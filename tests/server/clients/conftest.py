"""Clients that others wrote, unmodified, against a server in a thread; nothing leaves this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Running, running_server


def _is_local(address: Any) -> bool:
    host = address[0] if isinstance(address, tuple) else "127.0.0.1"  # a Unix socket has a path
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_outbound(connect: Callable[..., Any]) -> Callable[..., Any]:
    """A socket's connect that knows the way to this machine only."""

    def checked(one: socket.socket, address: Any) -> Any:
        if not _is_local(address):
            raise AssertionError(f"a test connects to {address}")
        return connect(one, address)

    return checked


def refuse_names(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """Resolution of this machine's names only."""

    def checked(host: Any, *arguments: Any, **more: Any) -> Any:
        text = host.decode() if isinstance(host, bytes) else host
        if text is not None and not _is_local((text,)):
            raise AssertionError(f"a test asks where {text} is")
        return resolve(host, *arguments, **more)

    return checked


@pytest.fixture(autouse=True, scope="package")
def only_loopback() -> Iterator[None]:
    """No client may ask anybody but the server under test: no telemetry, no downloads."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse_outbound(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", refuse_names(socket.getaddrinfo))
        for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def compact(server: Running) -> dict[str, int]:
    """A logit_bias against white space: where the grammar of JSON allows any, a random model writes much of it."""
    return {str(server.server.served.tokenizer.encode(space)[0]): -100 for space in " \n\t\r"}


@pytest.fixture(scope="package")
def thinking(thinking_model: Path) -> Iterator[Running]:
    with running_server(thinking_model) as running:
        yield running
