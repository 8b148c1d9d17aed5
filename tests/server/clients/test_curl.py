"""curl as people type it."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qnext.server.access.keys import KeyRing
from qnext.server.limits import Limits
from tests.pace import TRIES
from tests.server.serving import Running, running_server

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
JSON = ("-H", "Content-Type: application/json")
KEY = "sk-of-the-test"


def curl(*arguments: object) -> tuple[int, str]:
    """(status, body)"""
    done = subprocess.run(
        [
            "curl",
            "--silent",
            "--noproxy",
            "*",
            "--max-time",
            "30",
            "--write-out",
            "\n%{http_code}",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


@pytest.fixture(scope="module")
def guarded(chat_model: Path) -> Iterator[Running]:
    limits = Limits(max_body_bytes=100_000, drain_seconds=1.0)
    with running_server(chat_model, keys=KeyRing(plain=[KEY]), limits=limits) as running:
        yield running


def test_chat(server: Running) -> None:
    status, body = curl(f"{server.url}/v1/chat/completions", *JSON, "-d", json.dumps(ASK))
    answer = json.loads(body)
    assert status == 200 and answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 8
    # Without a header, curl -d says that the body is a form; the answer says what is wrong.
    status, body = curl(f"{server.url}/v1/chat/completions", "-d", json.dumps(ASK))
    assert status == 415 and "application/json" in json.loads(body)["error"]["message"]


def test_a_stream_comes_as_it_is_written(server: Running) -> None:
    """Each quarter of the lines ends long after the one before it, unless another process had the machine."""
    shares = []
    while len(shares) < TRIES and max(shares, default=0.0) <= 1 / 40:
        arrivals = arrivals_of_lines({**ASK, "max_tokens": 400, "ignore_eos": True, "stream": True}, server)
        marks = [arrivals[len(arrivals) * quarter // 4 - 1] for quarter in range(1, 5)]
        gaps = [later - earlier for earlier, later in itertools.pairwise([arrivals[0], *marks])]
        shares.append(min(gaps) / sum(gaps))
    assert max(shares) > 1 / 40, shares


def arrivals_of_lines(body: dict[str, Any], server: Running) -> list[float]:
    """When each line came."""
    arrivals: list[float] = []
    lines: list[str] = []
    with subprocess.Popen(
        [
            "curl",
            "-sN",
            "--noproxy",
            "*",
            "--max-time",
            "60",
            f"{server.url}/v1/chat/completions",
            *JSON,
            "-d",
            json.dumps(body),
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                arrivals.append(time.monotonic())
                lines.append(line.strip())
    assert process.returncode == 0 and lines[-1] == "data: [DONE]" and len(lines) > 200
    return arrivals


def test_a_key_is_asked_for(guarded: Running) -> None:
    url = f"{guarded.url}/v1/models"
    for headers in ((), ("-H", "Authorization: Bearer wrong"), ("-H", f"Authorization: Basic {KEY}")):
        status, body = curl(*headers, url)
        assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
    assert curl("-H", f"Authorization: Bearer {KEY}", url)[0] == 200
    assert curl("-H", f"x-api-key: {KEY}", url)[0] == 200


@pytest.mark.parametrize("expects", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_body_is_refused(guarded: Running, tmp_path: Path, expects: bool, chunked: bool) -> None:
    large = tmp_path / "body.json"
    large.write_text(json.dumps({**ASK, "user": "x" * 2_000_000}))
    more = [] if expects else ["-H", "Expect:"]
    if chunked:
        more += ["-H", "Transfer-Encoding: chunked"]
    status, body = curl(
        f"{guarded.url}/v1/chat/completions",
        "-H",
        f"Authorization: Bearer {KEY}",
        *JSON,
        *more,
        "--data-binary",
        f"@{large}",
    )
    assert status == 413 and json.loads(body)["error"]["code"] == "body_too_large"


def test_http_1_0(server: Running) -> None:
    url = f"{server.url}/v1/chat/completions"
    status, body = curl("--http1.0", url, *JSON, "-d", json.dumps(ASK))
    assert status == 200 and json.loads(body)["choices"]
    status, body = curl("--http1.0", "-N", url, *JSON, "-d", json.dumps({**ASK, "stream": True}))
    lines = body.strip().split("\n\n")
    assert status == 200 and lines[-1] == "data: [DONE]" and len(lines) > 3
    assert all(line.startswith("data: ") for line in lines), "no frames of chunks in between"


def test_health(guarded: Running) -> None:
    status, body = curl("--head", f"{guarded.url}/health/live")
    assert status == 200 and "x-request-id" in body.lower() and body.startswith("HTTP/1.1 200")
    assert curl(f"{guarded.url}/health/live") == (200, '{"status":"ok"}')
    assert curl("-H", f"x-api-key: {KEY}", f"{guarded.url}/health/ready") == (200, '{"status":"ready"}')
    assert curl(f"{guarded.url}/version")[0] == 401
    assert curl("-H", f"x-api-key: {KEY}", f"{guarded.url}/version")[0] == 200
    assert curl("-X", "DELETE", f"{guarded.url}/health/live")[0] == 405
