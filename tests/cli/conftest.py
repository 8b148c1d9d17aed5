"""Model folders that the tests of several verbs share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.text_folders import save_chat, save_plain


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No chat template, greedy by default."""
    return save_plain(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template and sampling defaults."""
    return save_chat(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def logs_of_others_stay() -> Iterator[None]:
    """`serve` makes the process's log its own."""
    loggers = [logging.getLogger(), logging.getLogger("uvicorn")]
    before = [(each, each.handlers[:], each.level) for each in loggers]
    yield
    for each, handlers, level in before:
        each.handlers[:] = handlers
        each.setLevel(level)
