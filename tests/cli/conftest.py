"""Model folders that the tests of several verbs share."""

from __future__ import annotations

from tests.text_folders import chat_folder, plain_folder  # noqa: F401 (fixtures)
from tests.thinking_server import server, thinking_folder  # noqa: F401 (fixtures)
