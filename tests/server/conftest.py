"""Servers on tiny models: in this process for most tests, as a command where processes and signals matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.serving import Running, running_server, save_served


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random hybrid model with a chat format and a context of 2,048 tokens."""
    return save_served(tmp_path_factory.mktemp("served") / "tiny-chat")


@pytest.fixture(scope="session")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("served") / "tiny-thinking", thinks=True)


@pytest.fixture(scope="session")
def server(chat_model: Path) -> Iterator[Running]:
    """One server for tests that leave nothing behind; no keys."""
    with running_server(chat_model) as running:
        yield running
