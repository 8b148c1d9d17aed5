"""A conversation over HTTP beside the same one here."""

from __future__ import annotations

import http.server
import json
import threading
import time
from pathlib import Path

import pytest

from qnext.checkpoint import load_model
from qnext.client.conversation import RemoteConversation
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.errors import UsageError
from qnext.session.conversation import Conversation
from qnext.text.chat import ChatFormat
from qnext.text.tokenizer import Tokenizer
from tests.server.serving import Running


def silent(text: str) -> None:
    """Where answers go that nobody reads."""


@pytest.fixture
def remote(server: Running) -> RemoteConversation:
    return RemoteConversation(server.url, "secret-key", "alias", {"max_tokens": 12, "temperature": 0})


@pytest.fixture
def local(thinking_folder: Path) -> Conversation:
    tokenizer = Tokenizer.from_folder(thinking_folder)
    engine = Engine.of(load_model(thinking_folder), EngineConfig(max_num_seqs=1))
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
    engine = Engine.of(load_model(chat_folder), EngineConfig(max_num_seqs=1))
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
