"""What several files of these tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.model import CausalLM
from tests.engine.disk_stores import open_store, random_tensors
from tests.engine.meta import launch_nothing
from tests.engine.models import tiny_model


@pytest.fixture
def model() -> CausalLM:
    """A tiny one of both kinds of layers."""
    return tiny_model("hybrid")


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A closed store with one entry, of the tokens 1 to 21."""
    with open_store(tmp_path / "store") as store:
        assert store.put("state", b"salt", range(1, 22), random_tensors(5))
    return tmp_path / "store"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were started, on a device that runs and trusts all of them."""
    return launch_nothing(monkeypatch)
