"""`qnext chat --url` against a server of this process, and what local and remote chats share beside plain answers."""

from __future__ import annotations

import http.server
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qnext.checkpoint import load_model
from qnext.cli import main
from qnext.cli._chat_loop import _Screen, _terminal_reader
from qnext.cli._conversation import Conversation
from qnext.cli._remote_talk import RemoteConversation
from qnext.engine import Engine, SamplingParams
from qnext.errors import UsageError
from qnext.server.keys import KeyRing
from qnext.text.chat import ChatFormat
from qnext.text.tokenizer import Tokenizer
from tests.server.serving import Running, running_server, save_served

Captured = pytest.CaptureFixture[str]


def silent(text: str) -> None:
    """Where answers go that nobody reads."""


def chat(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(SystemExit) as exit_:
        main(["chat", *map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture(scope="module")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "thinking", thinks=True)


@pytest.fixture(scope="module")
def server(thinking_folder: Path) -> Iterator[Running]:
    with running_server(thinking_folder, keys=KeyRing(plain=["secret-key"])) as running:
        yield running


@pytest.fixture
def remote(server: Running) -> RemoteConversation:
    return RemoteConversation(server.url, "secret-key", "alias", {"max_tokens": 12, "temperature": 0})


@pytest.fixture
def local(thinking_folder: Path) -> Conversation:
    tokenizer = Tokenizer.from_folder(thinking_folder)
    engine = Engine(load_model(thinking_folder), max_num_seqs=1)
    chat_format = ChatFormat.for_folder(thinking_folder)
    return Conversation(engine, tokenizer, chat_format, SamplingParams(max_tokens=12))


def test_local_and_remote_answers_are_the_same(local: Conversation, remote: RemoteConversation) -> None:
    """Both with a thought, two turns, a system message."""
    for talk in (local, remote):
        talk.system = "Be brief."
        thought: list[str] = []
        assert talk.answer("Hi", silent, thought.append) == "" and "".join(thought), "a random model ends no thought"
        assert talk.turns[-1].reasoning_content == "".join(thought)
        talk.answer("And?", silent)
    assert [(turn.role, turn.content, turn.reasoning_content) for turn in local.turns] == [
        (turn.role, turn.content, turn.reasoning_content) for turn in remote.turns
    ]


def test_without_thought_the_answer_is_content(local: Conversation, remote: RemoteConversation) -> None:
    answers: list[str] = []
    for talk in (local, remote):
        talk.set_thinking(False)
        answers.append(talk.answer("Hi", silent, answers.append))
    assert answers[0] == answers[1] != "" and len(answers) == 2


def test_json_answers(local: Conversation, remote: RemoteConversation) -> None:
    for talk in (local, remote):
        talk.set_thinking(False)
        talk.wants_json = True
        talk.set_parameter("max_tokens", "8")
        assert talk.answer("Hi", silent).lstrip().startswith("{")


def test_stats_count_tokens(local: Conversation, remote: RemoteConversation) -> None:
    for talk in (local, remote):
        talk.answer("Hi", silent)
        assert talk.stopwatch is not None and talk.stopwatch.num_tokens == 12
        assert "12 tokens, " in talk.stopwatch.describe() and "first token after 0." in talk.stopwatch.describe()


def test_a_model_without_thoughts_says_so(chat_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(chat_folder)
    engine = Engine(load_model(chat_folder), max_num_seqs=1)
    talk = Conversation(engine, tokenizer, ChatFormat.for_folder(chat_folder), SamplingParams())
    with pytest.raises(UsageError, match="no thoughts"):
        talk.set_thinking(False)


def test_ctrl_c_ends_the_request_on_the_server(server: Running, remote: RemoteConversation) -> None:
    remote.params = {"max_tokens": 1_900, "ignore_eos": True}
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt  # as Ctrl-C does, wherever it finds the reader

    remote.answer("Hi", write, write)
    assert remote.turns[-1].reasoning_content == "".join(seen) != ""
    end = time.monotonic() + 10
    engine = server.server.worker.engine
    while (server.server.active or engine.has_unfinished) and time.monotonic() < end:
        time.sleep(0.01)
    assert not server.server.active and not engine.has_unfinished
    assert remote.stopwatch is not None and remote.stopwatch.num_tokens < 1_000, "not because it was done"
    remote.params = {"max_tokens": 5, "temperature": 0}
    remote.answer("And now?", silent, seen.append)
    assert [turn.role for turn in remote.turns] == ["user", "assistant"] * 2 and remote.stopwatch.num_tokens == 5


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


class Breaking(http.server.BaseHTTPRequestHandler):
    """Streams two words with a line separator of Unicode between, then an error."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        chunk = {"choices": [{"delta": {"content": "one\u2028two"}}]}
        for document in (chunk, {"error": {"message": "the engine\nis gone"}}):
            self.wfile.write(f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_an_error_in_the_stream_keeps_nothing() -> None:
    fake = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    written: list[str] = []
    talk = RemoteConversation(f"http://127.0.0.1:{fake.server_address[1]}", None, "m", {})
    try:
        with pytest.raises(UsageError, match="the engine is gone"):
            talk.answer("Hi", written.append)
    finally:
        fake.shutdown()
        fake.server_close()
    assert written == ["one\u2028two"] and talk.turns == [] and talk.last_input is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_thoughts_are_dim_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = _Screen()
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
        read = _terminal_reader()
        threading.Timer(1.0, pipe.send_text, ["\r"]).start()
        pipe.send_text("Hello\x07")
        assert read(">>> ") == "Hello and more"
