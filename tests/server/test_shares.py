"""Several keys at one server: what one of them asks for keeps another neither waiting nor without its prefixes."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qnext.server.access.keys import KeyRing
from qnext.server.limits import Limits
from tests.server.serving import Running, running_server

LONG = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "temperature": 0, "stream": True}


def _server(chat_model: Path, **engine_options: Any) -> Any:
    limits = Limits(drain_seconds=0.2, park_seconds=0.1, write_seconds=30.0)
    keys = KeyRing(plain=["a", "b"], admin=["admin"])
    return running_server(chat_model, limits=limits, keys=keys, engine_options={"max_num_seqs": 4, **engine_options})


@pytest.fixture(scope="module")
def shared(chat_model: Path) -> Iterator[Running]:
    with _server(chat_model, num_blocks=400) as running:
        yield running


def _wait(done: Any, seconds: float = 30.0) -> float:
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < seconds
        time.sleep(0.005)
    return time.monotonic() - begin


def _stream(running: Running, key: str, **fields: Any) -> socket.socket:
    """A stream whose client reads nothing, unless the test does."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    one.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    body = json.dumps({**LONG, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    one.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return one


def _held(running: Running) -> dict[str, dict[str, int]]:
    """By the secret of the key, as administrators see it."""
    secrets = {running.server.keys.find(secret).id: secret for secret in ("a", "b")}  # type: ignore[union-attr]
    with running.client("admin") as client:
        keys = client.get(f"{running.admin_url}/admin/status").json()["keys"]
    return {secrets[entry["key_id"]]: entry for entry in keys}


def _is_idle(running: Running) -> bool:
    return not running.server.tasks and running.server.worker.num_queued == 0


def test_forty_streams_that_nobody_reads_keep_no_other_key_waiting(shared: Running) -> None:
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(_stream(shared, "a", logprobs=10))
        _wait(lambda: shared.gauges().num_running == 4 and len(shared.server.tasks) == 40)
        with shared.client("b") as client:
            answer = client.post("/v1/completions", json={**LONG, "max_tokens": 20, "stream": False})
            assert answer.status_code == 200
            _wait(lambda: len(shared.server.tasks) <= 40)  # the answer's own task ends a moment after it
            assert len(shared.server.tasks) == 40, "none of them is through"
        _wait(lambda: _held(shared).get("a", {}).get("num_parked", 0) >= 4)
    _wait(lambda: _is_idle(shared))
    shared.server.worker.engine.check_integrity()


def test_a_stream_that_is_read_again_goes_on_as_if_it_had_never_stopped(shared: Running) -> None:
    wanted = {**LONG, "logprobs": 10}
    with shared.client("a") as client:
        whole = client.post("/v1/completions", json={**wanted, "stream": False, "cache_salt": "whole"}).json()[
            "choices"
        ][0]
    with _stream(shared, "a", **wanted, cache_salt="of its own") as one:
        _wait(lambda: _held(shared).get("a", {}).get("num_parked", 0) == 1)
        assert shared.gauges().num_running == 0
        received = b""
        while b"[DONE]" not in received:
            part = one.recv(1 << 16)
            assert part
            received += part
    lines = received.replace(b"\r\n", b"\n").split(b"\n")
    frames = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    choices = [frame["choices"][0] for frame in frames if frame["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    read = [p for choice in choices if choice["logprobs"] for p in choice["logprobs"]["token_logprobs"]]
    assert read == whole["logprobs"]["token_logprobs"], "the very same bits"
    _wait(lambda: _is_idle(shared))


def test_a_slow_reader_gets_all_of_its_answer(shared: Running) -> None:
    with _stream(shared, "a", max_tokens=300, logprobs=10) as one:
        received = b""
        while b"[DONE]" not in received:
            part = one.recv(8_192)
            assert part
            received += part
            time.sleep(0.01)
    assert received.count(b'"finish_reason":"length"') == 1


def _cached(client: Any, prompt: str, **more: Any) -> int:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("with_disk", [False, True])
def test_a_flood_of_salts_takes_no_prefix_of_another_key(chat_model: Path, tmp_path: Path, with_disk: bool) -> None:
    """In memory, and on disk after a restart."""
    mine = "The password of the vault is swordfish. " * 15
    disk = {"disk_cache": tmp_path / "cache", "disk_cache_bytes": 1_000_000} if with_disk else {}
    options = {"num_blocks": 200, "num_checkpoints": 8, **disk}
    with _server(chat_model, **options) as running, running.client("a") as flood, running.client("b") as other:
        assert _cached(other, mine) == 0
        assert _cached(other, mine) > 500
        for n in range(60):
            _cached(flood, f"{n} " + "flood " * 100, cache_salt=f"salt-{n}")
        assert _cached(other, mine) > 500
        held = _held(running)
        assert held["a"]["num_blocks"] > held["b"]["num_blocks"] > 0
        if with_disk:
            assert held["a"]["disk_bytes"] > 800_000
    if with_disk:
        with _server(chat_model, **options) as running, running.client("b") as other:
            assert _cached(other, mine) > 500
