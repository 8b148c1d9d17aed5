"""`qnext chat --url` against a server of this process, and what local and remote chats share beside plain answers."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qnext.cli import main
from qnext.cli.terminal.chat_loop import Screen, terminal_reader
from tests.server.serving import Running

Captured = pytest.CaptureFixture[str]


def chat(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(SystemExit) as exit_:
        main(["chat", *map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_a_conversation_through_a_pipe(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    path = tmp_path / "talk.json"
    script = f"""/set nothink
/set format json
/set format text
/set verbose
/set parameter heat 3
/set parameter temperature warm
/set parameter temperature 0
/set system Short.
Hi
/set quiet
/regenerate
/show info
/show parameters
/show nothing
/save {path}
/clear
/load {path}
/set parameter temperature 99
Hi
/bye
"""
    arguments = ["--url", server.url, "--api-key", "secret-key", "--max-tokens", "5", "--stop", "never to be seen"]
    assert chat(monkeypatch, script, *arguments) == 0
    captured = capsys.readouterr()
    saved = json.loads(path.read_text())
    assert saved["system"] == "Short." and saved["parameters"] == {"max_tokens": 5, "temperature": 0}
    answer = saved["messages"][1]["content"]
    assert captured.out == (answer if answer.endswith("\n") else answer + "\n") * 2
    for part in ("no parameter 'heat'", "'warm' is not a number", "model thinking at http", "2 turns", "max_tokens 5"):
        assert part in captured.err
    assert "usage: /show, or /show info|parameters|system" in captured.err
    assert captured.err.count("first token after") == 1
    assert "400: temperature: Input should be less than or equal to 2" in captured.err


def test_completion(server: Running, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    arguments = ["--url", f"{server.url}/v1/", "--api-key", "secret-key", "--complete", "--max-tokens", "7"]
    assert chat(monkeypatch, "Hello\n/set system x\n", *arguments, "--temperature", "0") == 0
    captured = capsys.readouterr()
    with server.client("secret-key") as client:
        body = {"prompt": "Hello", "max_tokens": 7, "temperature": 0}
        expected = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert captured.out.rstrip("\n") == expected.rstrip("\n") and "needs a chat format" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "{url}"], "401: a valid API key is needed"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9: ConnectError"),
        (["--url", "{url}", "--context", "32k"], "are the server's to say"),
        (["folder", "--api-key", "x"], "belong to --url"),
        ([], "either MODEL or --url"),
    ],
)
def test_a_users_fault_is_one_line(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: Captured, arguments: list[str], message: str
) -> None:
    assert chat(monkeypatch, "Hi\n", *[text.replace("{url}", server.url) for text in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and len(captured.err.splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_thoughts_are_dim_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    screen.write_thought("Hm\x1b[31m")
    screen.write("Yes")
    screen.finish()
    assert sys.stderr.getvalue() == "\x1b[2mHm\ufffd[31m\x1b[0m\n\n"  # type: ignore[attr-defined]
    assert sys.stdout.getvalue() == "Yes\n"  # type: ignore[attr-defined]


def test_ctrl_g_opens_the_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf ' and more' >> \"$1\"\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        read = terminal_reader()
        line = read.__self__.default_buffer  # type: ignore[attr-defined]

        def enter() -> None:
            """When the editor's text is there, however long it takes."""
            deadline = time.monotonic() + 60.0
            while line.text != "Hello and more" and time.monotonic() < deadline:
                time.sleep(0.01)
            pipe.send_text("\r")

        threading.Thread(target=enter).start()
        pipe.send_text("Hello\x07")
        assert read(">>> ") == "Hello and more"
