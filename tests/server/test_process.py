"""The server as a process: ready, drained, killed, started again, and what it refuses at its start."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx2
import pytest

from qnext.server.run import EXIT_HUNG
from tests.cli.command import Capture, run
from tests.forked import Program
from tests.server.process import Process, process

LONG = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}


def read_stream(one: Process, body: dict[str, object], found: list[str], begun: threading.Event) -> None:
    with (
        one.client() as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
        contextlib.suppress(httpx2.RemoteProtocolError),  # whoever reads `found` sees that its end is missing
    ):
        for line in answer.iter_lines():
            found.append(line)
            begun.set()


def start_streams(one: Process, number: int, body: dict[str, object]) -> tuple[list[list[str]], list[threading.Thread]]:
    found: list[list[str]] = [[] for _ in range(number)]
    events = [threading.Event() for _ in range(number)]
    threads = [
        threading.Thread(target=read_stream, args=(one, body, lines, event), daemon=True)
        for lines, event in zip(found, events, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert all(event.wait(60.0) for event in events)
    return found, threads


def test_sigterm_lets_running_streams_end(chat_model: Path) -> None:
    with process(chat_model, "--shutdown-timeout", 20) as one:
        found, threads = start_streams(one, 6, {**LONG, "max_tokens": 600})
        one.signal(signal.SIGTERM)
        with one.client() as client:
            while (ready := client.get("/health/ready")).status_code == 200:
                time.sleep(0.01)
            refused = client.post("/v1/completions", json={"prompt": "a"})
        for thread in threads:
            thread.join(60.0)
        assert one.wait() == 0
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    assert ready.status_code == 503
    for lines in found:
        last = [line for line in lines if line]
        assert last[-1] == "data: [DONE]"
        assert json.loads(last[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_streams_that_outlast_the_drain_end_with_an_error(chat_model: Path) -> None:
    with process(chat_model, "--shutdown-timeout", 0.2) as one:
        found, threads = start_streams(one, 4, LONG)
        one.signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60.0)
        assert one.wait() == 0
    ends = [[line for line in lines if line][-2:] for lines in found]
    assert all(last == "data: [DONE]" for _, last in ends)
    documents = [json.loads(line.removeprefix("data: ")) for line, _ in ends]
    assert any("error" in document for document in documents), "nobody waits until all are through"
    assert all("error" in one or one["choices"][0]["finish_reason"] == "length" for one in documents)


def test_a_second_signal_does_not_wait(chat_model: Path) -> None:
    with process(chat_model, "--shutdown-timeout", 60) as one:
        found, threads = start_streams(one, 2, LONG)
        one.signal(signal.SIGTERM)
        with one.client() as client:
            while client.get("/health/ready").status_code == 200:
                time.sleep(0.01)
        one.signal(signal.SIGTERM)
        assert one.wait(30.0) == 0, "half of what it would wait for the streams"
        for thread in threads:
            thread.join(5.0)
    assert all([line for line in lines if line][-1] == "data: [DONE]" for lines in found)


def test_killed_and_started_again_it_finds_its_cache(chat_model: Path, tmp_path: Path) -> None:
    prompt = {"prompt": "All work and no play. " * 40, "max_tokens": 8, "temperature": 0}
    flags = ("--disk-cache", tmp_path / "cache")
    with process(chat_model, *flags) as one:
        with one.client() as client:
            first = client.post("/v1/completions", json=prompt).json()
        one.signal(signal.SIGTERM)
        assert one.wait() == 0
    with process(chat_model, *flags) as one:
        start_streams(one, 3, LONG)
        one.signal(signal.SIGKILL)
        assert one.wait() == -signal.SIGKILL
    with process(chat_model, *flags) as one, one.client() as client:
        again = client.post("/v1/completions", json=prompt).json()
        assert client.get("/health/ready").status_code == 200
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_keys_are_read_again_on_sighup(chat_model: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "keys.json"
    old = run(capsys, "keys", "create", "--file", file, "--name", "old").out.strip()
    with process(chat_model, "--keys", file) as one, one.client() as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert status(old) == 200 and client.get("/v1/models").status_code == 401
        new = run(capsys, "keys", "create", "--file", file, "--name", "new").out.strip()
        assert status(new) == 401
        one.signal(signal.SIGHUP)
        end = time.monotonic() + 30.0
        while status(new) != 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert status(new) == 200
    assert not any(key in line for key in (old, new) for line in one.lines)


def test_health_needs_no_key_and_a_unix_socket_works(chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with process(chat_model, "--uds", path, "--api-key", "secret-key"):
        transport = httpx2.HTTPTransport(uds=str(path))
        with httpx2.Client(transport=transport, base_url="http://server") as client:
            assert client.get("/health/live").status_code == 200
            assert client.get("/health/ready").status_code == 401
            assert client.get("/health/ready", headers={"x-api-key": "secret-key"}).status_code == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "give --api-key"),
        (("--admin-port", "0"), "--admin-api-key"),
        (("--trust-remote-code",), "nothing of a model is run"),
        (("--speculative-config", "{"), "must be a JSON object"),
        (("--ssl-certfile", "x.pem"), "belong together"),
        (("--api-key", " "), "must not be empty"),
        (("--allowed-hosts", "a.example,http://b.example"), "--allowed-hosts: 'http://b.example' is no host name"),
    ],
)
def test_flags_that_are_refused(chat_model: Path, capsys: Capture, flags: tuple[str, ...], message: str) -> None:
    result = run(capsys, "serve", chat_model, *flags)
    assert result.code == 2 and message in result.error_line


def test_a_model_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    assert run(capsys, "serve", tmp_path / "nothing").code == 3


def test_an_address_that_is_taken(chat_model: Path, server: object, capsys: Capture) -> None:
    port = server.url.rsplit(":", 1)[1]  # type: ignore[attr-defined]
    result = run(capsys, "serve", chat_model, "--port", port)
    assert result.code == 2 and "cannot listen on" in result.err


HUNG = """
import sys, time
from pathlib import Path
from qnext.server.server import Server
from qnext.server.limits import Limits
from qnext.server.run import Listen, serve
from tests.server.serving import load_engine

def load():
    engine, served = load_engine(Path(sys.argv[1]))
    engine.step = lambda: time.sleep(600)
    return engine, served

serve(lambda: Server(limits=Limits(watchdog_seconds=0.5)), load, Listen(port=0),
      on_ready=lambda server, urls: print(urls.public, flush=True))
"""


@pytest.mark.parametrize("is_told_to_stop", [False, True])
def test_a_step_that_does_not_end_ends_the_process(chat_model: Path, is_told_to_stop: bool) -> None:
    with Program(["-c", HUNG, chat_model], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as hung:
        assert hung.stdout is not None
        url = hung.stdout.readline().strip()
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(f"{url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=0.3)
        if is_told_to_stop:
            hung.send_signal(signal.SIGTERM)
        _, errors = hung.communicate(timeout=60.0)
    assert hung.returncode == EXIT_HUNG
    assert "a step of the engine does not end" in errors and "most recent call first" in errors
