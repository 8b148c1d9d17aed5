"""Model folders that the tests of several verbs share."""

from __future__ import annotations

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
