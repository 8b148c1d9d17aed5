"""A model that chats, and two samples for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.text_folders import save_chat


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("base") / "chat")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    values = [{"prompt": question, "completion": answer} for question, answer in (("a?", "Yes."), ("b?", "No."))]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path
