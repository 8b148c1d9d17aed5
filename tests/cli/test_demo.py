"""How `qnext demo` ends: the model's page, and the terminal as one of its clients."""

from __future__ import annotations

import io
import re
import socket
import sys
from pathlib import Path

import httpx2
import pytest

from qnext.cli import _chat_loop
from qnext.cli.demo import _free, _talk


class Display:
    """Keeps what the demo notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_the_page_is_open_while_the_terminal_talks(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display()
    pages: list[str] = []
    converse = _chat_loop.converse

    def look_and_converse(talk: object) -> None:
        found = re.search(r"http\S+", display.lines[-1])
        assert found is not None
        pages.append(httpx2.get(found[0]).text)
        assert httpx2.get(f"{found[0]}live/model").json()["has_chat"] is False
        converse(talk)  # type: ignore[arg-type]

    monkeypatch.setattr(_chat_loop, "converse", look_and_converse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main(\n"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    _talk(plain_folder, display, 0, 0)  # type: ignore[arg-type]
    assert "<title>" in pages[0]
    assert capsys.readouterr().out.strip(), "the model went on"


def test_a_port_that_is_taken_gives_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert _free(port) == 0
    assert _free(port) == port
