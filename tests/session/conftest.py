"""The model folders that are opened."""

from __future__ import annotations

from tests.text_folders import chat_folder, plain_folder  # noqa: F401 (fixtures)
