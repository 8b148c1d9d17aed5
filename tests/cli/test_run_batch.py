"""`qnext run-batch`: its lines, what a second run does, retries, Ctrl-C, and that it answers as HTTP does."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest

from qnext.errors import QnextError
from qnext.server.server import Server
from qnext.session.folder import open_folder
from qnext.session.in_process import ask_in_process
from qnext.session.served import ServeConfig, load_served
from tests.forked import Program
from tests.server.serving import running_server

from .command import Capture, run


def line(custom_id: object, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(text if isinstance(text, str) else json.dumps(text) + "\n" for text in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(each) for each in text.splitlines()]


def test_answers_here_are_those_over_http(chat_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    chat = line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=6, seed=1)
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", prompt=f"Hello {i}") for i in range(20)] + [chat])
    assert run(capsys, "run-batch", chat_folder, "-i", source, "-o", tmp_path / "here.jsonl").code == 0
    with running_server(chat_folder) as server:
        result = run(capsys, "run-batch", "--url", f"{server.url}/v1", "-i", source, "-o", tmp_path / "there.jsonl")
    assert result.code == 0
    assert "21 requests: 21 answered, 0 failed; " in result.err and "tokens/s" in result.err

    def texts(name: str) -> dict[str, Any]:
        answers = read(tmp_path / name)
        assert all(answer["error"] is None and answer["response"]["request_id"] for answer in answers)
        return {answer["custom_id"]: answer["response"]["body"]["choices"] for answer in answers}

    here = texts("here.jsonl")
    assert here == texts("there.jsonl") and len(here) == 21
    assert here["chat"][0]["message"]["role"] == "assistant"


def test_all_four_routes(chat_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    say = [{"role": "user", "content": "Hi"}]
    bodies = {
        "/v1/chat/completions": {"messages": say, "max_tokens": 5, "ignore_eos": True},
        "/v1/completions": {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 5, "ignore_eos": True},
        "/v1/messages": {"model": "chat", "messages": say, "max_tokens": 5, "ignore_eos": True},
    }
    lines = [{"custom_id": url, "method": "POST", "url": url, "body": body} for url, body in bodies.items()]
    source = write(tmp_path / "in.jsonl", lines)
    result = run(capsys, "run-batch", chat_folder, "-i", source, "-o", tmp_path / "out.jsonl")
    answers = {answer["custom_id"]: answer["response"] for answer in read(tmp_path / "out.jsonl")}
    assert {url: answer["status_code"] for url, answer in answers.items()} == dict.fromkeys(bodies, 200), answers
    usages = [answer["body"]["usage"] for answer in answers.values()]
    output = sum(usage.get("completion_tokens") or usage["output_tokens"] for usage in usages)
    assert result.code == 0 and output > 0 and f"{output} of answers" in result.err


def test_a_second_run_asks_for_the_rest_alone(chat_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    lines = [line(f"r{i}") for i in range(4)]
    source = write(tmp_path / "in.jsonl", [*lines, line("r0"), "nonsense\n", line("bad", temperature=9)])
    output = tmp_path / "out.jsonl"
    first = run(capsys, "run-batch", chat_folder, "-i", source, "-o", output)
    assert first.code == 1 and "7 requests: 4 answered, 3 failed;" in first.err
    answers = {answer["custom_id"]: answer for answer in read(output) if answer["response"]}
    assert answers["bad"]["response"]["status_code"] == 400
    assert "temperature" in answers["bad"]["response"]["body"]["error"]["message"]
    # One answer is torn, one is lost, and the line that failed is mended.
    kept = [json.dumps(answers[name]) for name in ("r0", "bad", "r2")]
    output.write_text("\n".join(kept) + "\n" + json.dumps(answers["r1"], separators=(",", ":"))[:60])
    write(source, [*lines, line("bad")])
    second = run(capsys, "run-batch", chat_folder, "-i", source, "-o", output)
    assert second.code == 0 and "3 requests: 3 answered, 0 failed; 2 answered before;" in second.err
    found = read(output)
    assert sorted(answer["custom_id"] for answer in found) == ["bad", "r0", "r1", "r2", "r3"]
    assert all(answer["response"]["status_code"] == 200 for answer in found)
    assert found[0] == answers["r0"] and found[1] == answers["r2"], "what was answered stays as it was"


def test_a_broken_engine_ends_the_run(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def run_step(self: object, plan: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("qnext.engine.execution.local.LocalExecutor.execute", run_step)
    source = write(tmp_path / "in.jsonl", [line(f"r{i}") for i in range(300)])
    arguments = ["-i", source, "-o", tmp_path / "out.jsonl", "--max-num-seqs", 2]
    result = run(capsys, "run-batch", chat_folder, *arguments)
    assert result.code == 2 and "the engine has failed" in result.err.splitlines()[-1]
    # What had been asked by then got its answer; nothing was asked after it.
    found = read(tmp_path / "out.jsonl")
    assert 0 < len(found) < 300 and {answer["response"]["status_code"] for answer in found} <= {500, 503}


def test_an_answer_that_came_outlives_the_engine(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine fails while the answer is on its way: it counts, and the next request is not asked."""
    post = httpx2.AsyncClient.post
    num_posts = 0

    async def post_and_fail(self: httpx2.AsyncClient, *arguments: Any, **options: Any) -> httpx2.Response:
        nonlocal num_posts
        response = await post(self, *arguments, **options)
        num_posts += 1
        monkeypatch.setattr(Server, "fault", "the engine has failed")
        return response

    async def ask_twice() -> int:
        loaded = load_served(open_folder(str(chat_folder)), ServeConfig(["m"], {"max_num_seqs": 1}))
        async with ask_in_process(*loaded, request_seconds=60.0, max_body_bytes=1 << 20) as ask:
            body = json.dumps(line("a")["body"]).encode()
            answered = await ask("/v1/completions", body)
            with pytest.raises(QnextError, match="the engine has failed"):
                await ask("/v1/completions", body)
        return answered.status_code

    monkeypatch.setattr(httpx2.AsyncClient, "post", post_and_fail)
    assert (asyncio.run(ask_twice()), num_posts) == (200, 1)


def test_a_run_that_cannot_begin_leaves_no_file(chat_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    arguments = ["-i", source, "-o", tmp_path / "out.jsonl", "--max-model-len", 1]
    assert run(capsys, "run-batch", chat_folder, *arguments).code == 2
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "out.jsonl").touch()
    assert run(capsys, "run-batch", chat_folder, *arguments).code == 2
    assert (tmp_path / "out.jsonl").exists(), "it was there before"


def test_standard_streams(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(line("a")).encode())))
    with pytest.raises(SystemExit) as exit_:
        from qnext.cli import main

        main(["run-batch", str(chat_folder), "-i", "-", "-o", "-"])
    out = capfdbinary.readouterr().out
    assert exit_.value.code == 0
    assert json.loads(out)["custom_id"] == "a" and out.count(b"\n") == 1


class Handler(http.server.BaseHTTPRequestHandler):
    """Refuses twice, as a full server does, then answers; counts what it is asked."""

    num_posts = 0
    keys: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        type(self).num_posts += 1
        self.keys.add(self.headers["Authorization"])
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.num_posts <= 2:
            self._send(429 if self.num_posts == 1 else 503, {"error": {"message": "full"}}, {"Retry-After": "0"})
        else:
            self._send(200, {"usage": {"input_tokens": 3, "output_tokens": 5}})

    def _send(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def busy_server() -> Iterator[str]:
    Handler.num_posts = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_busy_server_is_asked_again(tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path / "in.jsonl", [line("a", "/v1/messages")])
    with busy_server() as url:
        result = run(
            capsys, "run-batch", "--url", url, "--api-key", "secret", "-i", source, "-o", tmp_path / "out.jsonl"
        )
    assert result.code == 0 and Handler.num_posts == 3 and Handler.keys == {"Bearer secret"}
    assert "3 tokens of prompts and 5 of answers" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "either MODEL or --url"),
        (["m", "--url", "http://x"], 2, "either MODEL or --url"),
        (["--url", "localhost:8000"], 2, "must begin with http://"),
        (["--url", "http://127.0.0.1:9"], 2, "http://127.0.0.1:9: ConnectError"),
        (["missing-folder"], 3, "missing-folder"),
        (["m", "--request-timeout", "0"], 2, "must be positive"),
    ],
)
def test_a_users_fault_is_one_line(
    tmp_path: Path, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    result = run(capsys, "run-batch", *arguments, "-i", source, "-o", tmp_path / "out.jsonl")
    assert result.code == code and message in result.error_line


def test_the_input_is_never_written_over(tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    assert "is the input" in run(capsys, "run-batch", "m", "-i", source, "-o", source).error_line
    assert run(capsys, "run-batch", "m", "-i", tmp_path / "none", "-o", source).code == 3


def test_ctrl_c_leaves_whole_lines(chat_folder: Path, tmp_path: Path) -> None:
    """A process of its own: signals belong to the main thread."""
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", max_tokens=60, ignore_eos=True) for i in range(600)])
    output = tmp_path / "out.jsonl"
    words = ["-m", "qnext", "run-batch", chat_folder, "-i", source, "-o", output]
    process = Program(words, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 100
        while (not output.exists() or output.stat().st_size < 2_000) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert 0 < len(read(output)) < 600
    assert "the same command goes on" in error and "Traceback" not in error


def test_clients_load_no_torch(chat_folder: Path, tmp_path: Path) -> None:
    """They are there at once, on machines without a model too."""
    source = write(tmp_path / "in.jsonl", [line("a")])
    code = f"""
import sys
from qnext.cli import main
for arguments in (
    ["run-batch", "-i", {str(source)!r}, "-o", "-"],
    ["chat", "--max-tokens", "3"],
    ["bench", "serve", "--random-input-len", "4", "--random-output-len", "2", "--num-prompts", "2"],
):
    try:
        main([*arguments, "--url", sys.argv[1]])
    except SystemExit as exit_:
        assert not exit_.code
sys.exit(", ".join({{"torch", "transformers"}} & set(sys.modules)) or 0)
"""
    with running_server(chat_folder) as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "batch_req_" in done.stdout and "2 answered, 0 failed" in done.stdout
