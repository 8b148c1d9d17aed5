"""A server with a key, on a tiny model that thinks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.server.access.keys import KeyRing
from tests.server.serving import Running, running_server, save_served


@pytest.fixture(scope="module")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "thinking", thinks=True)


@pytest.fixture(scope="module")
def server(thinking_folder: Path) -> Iterator[Running]:
    with running_server(thinking_folder, keys=KeyRing(plain=["secret-key"])) as running:
        yield running
