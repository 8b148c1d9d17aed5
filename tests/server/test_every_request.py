"""Every answer that leaves the server has its line and is counted, whoever gave it; so has what ended without one."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qnext.server.access.audit import AuditLog
from qnext.server.access.keys import KeyRing, KeyStore
from qnext.server.limits import Limits
from tests.server.serving import Running, running_server

USER, ADMIN = "user-secret", "admin-secret"
AUTH = f"Authorization: Bearer {USER}\r\n"
LIMITS = Limits(
    header_seconds=0.4,
    body_seconds=0.4,
    write_seconds=0.3,
    max_connections=6,
    max_header_bytes=4_096,
    max_body_bytes=10_000,
    drain_seconds=0.5,
)


class Watched:
    """A server and the lines that its audit log got since the last `mark`."""

    def __init__(self, running: Running, path: Path) -> None:
        self.running = running
        self.path = path
        host, _, port = running.url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.mark()

    def mark(self) -> None:
        self._offset = self.path.stat().st_size

    def new_lines(self) -> list[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            return [json.loads(line) for line in file.read().splitlines()]

    def lines(self, number: int = 1) -> list[dict[str, Any]]:
        """Once there are so many; and no more a moment later."""
        found: list[dict[str, Any]] = []
        for _ in range(400):
            found = self.new_lines()
            if len(found) >= number:
                break
            time.sleep(0.01)
        assert len(found) == number, found
        return found

    def talk(self, sent: bytes, *, half_closes: bool = False) -> bytes:
        """What came back until the server closed, or the first whole answer without a word more."""
        with socket.create_connection(self.address, timeout=5.0) as one:
            one.sendall(sent)
            if half_closes:
                one.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while part := one.recv(65_536):
                    received += part
                    head, _, body = received.partition(b"\r\n\r\n")
                    length = re.search(rb"content-length: (\d+)", head)
                    if (length and len(body) >= int(length[1])) or received.startswith(b"HTTP/1.1 204 "):
                        break
            except ConnectionError:
                pass
        return received

    def counted(self, name: str) -> dict[str, float]:
        lines = self.running.call(self.running.server.render_metrics).decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


@pytest.fixture(scope="module")
def kept(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    path = tmp_path_factory.mktemp("every") / "audit.jsonl"
    keys = KeyRing(plain=[USER], admin=[ADMIN])
    origins = ["https://friend.example"]
    with running_server(chat_model, keys=keys, audit=AuditLog(path), limits=LIMITS, origins=origins) as running:
        yield Watched(running, path)


def request(line: str, headers: str = "", body: bytes = b"") -> bytes:
    return f"{line} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode("latin-1") + body


JSON = "Content-Type: application/json\r\n"
ANSWERED: list[tuple[str, bytes, int, str | None, str | None, str | None]] = [
    # name, what is sent, status, error_code, route, method of the line
    ("no key", request("GET /v1/models"), 401, "invalid_api_key", "/v1/models", "GET"),
    ("no key for metrics", request("GET /metrics"), 401, "invalid_api_key", "/metrics", "GET"),
    ("no key for readiness", request("GET /health/ready"), 401, "invalid_api_key", "/health/ready", "GET"),
    ("no scope", request("GET /metrics", AUTH), 403, "insufficient_scope", "/metrics", "GET"),
    ("no route", request("GET /nothing", AUTH), 404, "not_found", None, "GET"),
    ("no file", request("GET /page/nothing.js"), 404, "not_found", "/page/{name:path}", "GET"),
    ("a long target", request("GET /" + "a" * 3_000, AUTH), 404, "not_found", None, "GET"),
    (
        "another method",
        request("DELETE /v1/models/alias", AUTH),
        405,
        "method_not_allowed",
        "/v1/models/{model:path}",
        "DELETE",
    ),
    ("a method of nobody", request("SECRETWORD /version", AUTH), 405, "method_not_allowed", "/version", None),
    (
        "no JSON",
        request("POST /tokenize", AUTH + "Content-Length: 2\r\nContent-Type: text/plain\r\n", b"{}"),
        415,
        "unsupported_media_type",
        "/tokenize",
        "POST",
    ),
    (
        "compressed",
        request("POST /tokenize", AUTH + JSON + "Content-Length: 2\r\nContent-Encoding: gzip\r\n", b"{}"),
        415,
        "unsupported_media_type",
        None,
        "POST",
    ),
    (
        "too large",
        request("POST /tokenize", AUTH + JSON + "Content-Length: 20000\r\n"),
        413,
        "body_too_large",
        "/tokenize",
        "POST",
    ),
    (
        "too slow a body",
        request("POST /tokenize", AUTH + JSON + "Content-Length: 20\r\n", b"{"),
        408,
        None,
        "/tokenize",
        "POST",
    ),
    ("too many headers", request("GET /version", AUTH + "A: b\r\n" * 120), 431, "headers_too_large", None, "GET"),
    ("a head without an end", b"GET / HTTP/1.1\r\nA: " + b"a" * 10_000, 431, "headers_too_large", None, None),
    (
        "two lengths",
        request("POST /tokenize", AUTH + JSON + "Content-Length: 2\r\nContent-Length: 3\r\n", b"{}x"),
        400,
        "invalid_request",
        None,
        None,
    ),
    (
        "length and chunks",
        request("POST /tokenize", AUTH + JSON + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
        400,
        "invalid_request",
        None,
        "POST",
    ),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_request", None, None),
    ("no host", b"GET /version HTTP/1.1\r\n\r\n", 400, "invalid_request", None, None),
    (
        "a body in crumbs",
        request("POST /tokenize", AUTH + JSON + "Transfer-Encoding: chunked\r\n", b"1\r\n \r\n" * 1_100),
        400,
        "invalid_request",
        "/tokenize",
        "POST",
    ),
    (
        "a bad chunk",
        request("POST /tokenize", AUTH + JSON + "Transfer-Encoding: chunked\r\n", b"zz\r\n"),
        400,
        "invalid_request",
        "/tokenize",
        "POST",
    ),
    ("another version", b"GET /version HTTP/3.0\r\nHost: localhost\r\n\r\n", 505, "invalid_request", None, "GET"),
    ("another host", b"GET /health/live HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421, "host_not_allowed", None, "GET"),
    (
        "another origin",
        request("POST /tokenize", AUTH + JSON + "Origin: https://evil.example\r\nContent-Length: 2\r\n", b"{}"),
        403,
        "origin_not_allowed",
        None,
        "POST",
    ),
    ("a preflight", request("OPTIONS /tokenize", "Origin: https://friend.example\r\n"), 204, None, None, "OPTIONS"),
]


@pytest.mark.parametrize("case", ANSWERED, ids=[case[0] for case in ANSWERED])
def test_an_answer_has_its_line_and_is_counted(kept: Watched, case: Any) -> None:
    _, sent, status, code, route, method = case
    series = f'method="{method or "other"}",route="{route or "unmatched"}",status="{status}"'
    before, rejected = kept.counted("qnext_http_requests_total"), kept.counted("qnext_rejected_total")
    kept.mark()
    received = kept.talk(sent)
    assert received.startswith(b"HTTP/1.1 %d " % status), received[:200]
    assert b"x-request-id: " in received and b"x-content-type-options: nosniff" in received
    (line,) = kept.lines()
    assert (line["status"], line["error_code"], line["route"], line["method"]) == (status, code, route, method)
    assert line["client"] == "127.0.0.1" and line["request_id"].encode() in received
    knows_key = (AUTH.encode() in sent and method is not None) or b"SECRETWORD" in sent
    assert (line["key_id"] is not None) == knows_key, line
    assert "SECRETWORD" not in json.dumps(line)
    after, refused = kept.counted("qnext_http_requests_total"), kept.counted("qnext_rejected_total")
    (name,) = [name for name in after if all(part in name for part in series.split(","))]
    assert after[name] - before.get(name, 0.0) == 1.0
    assert sum(refused.values()) - sum(rejected.values()) == (1.0 if status >= 400 else 0.0)


def test_what_ends_without_an_answer_has_its_line(kept: Watched) -> None:
    kept.mark()
    assert kept.talk(b"GET /version HTTP/1.1\r\nHost: loc") == b""  # the server closes when the time is over
    (line,) = kept.lines()
    assert (line["status"], line["error_code"], line["route"]) == (499, "client_too_slow", None)
    for sent, route in (
        (b"GET /version HTTP/1.1\r\nHost: loc", None),
        (request("POST /tokenize", AUTH + JSON + "Content-Length: 20\r\n", b"{"), "/tokenize"),
    ):
        kept.mark()
        with socket.create_connection(kept.address, timeout=5.0) as one:
            one.sendall(sent)
            time.sleep(0.05)
        (line,) = kept.lines()
        assert (line["status"], line["error_code"], line["route"]) == (499, "client_disconnected", route)


def test_a_connection_that_says_nothing_is_no_request(kept: Watched) -> None:
    kept.mark()
    with socket.create_connection(kept.address, timeout=5.0):
        time.sleep(0.05)
    kept.talk(b"")
    kept.lines(0)


def test_connections_above_the_limit_have_lines(kept: Watched) -> None:
    crowd = [socket.create_connection(kept.address, timeout=5.0) for _ in range(LIMITS.max_connections)]
    try:
        time.sleep(0.05)
        kept.mark()
        received = kept.talk(request("GET /version", AUTH))
        assert received.startswith(b"HTTP/1.1 503 ") and b"x-request-id: " in received
        (line,) = kept.lines()
        assert (line["status"], line["error_code"], line["method"]) == (503, "overloaded", "GET") and line["key_id"]
    finally:
        for one in crowd:
            one.close()


def test_what_breaks_inside_has_its_line(kept: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it breaks before a route has the request."""
    monkeypatch.setattr("qnext.server.http.endpoint._exchange", lambda *_: 1 / 0)
    kept.mark()
    received = kept.talk(request("GET /version", AUTH))
    assert received.startswith(b"HTTP/1.1 500 ") and b'"internal_error"' in received and b"ZeroDivision" not in received
    (line,) = kept.lines()
    assert (line["status"], line["error_code"]) == (500, "internal_error")


def test_what_answers_all_day_leaves_a_line_only_when_it_refuses(kept: Watched) -> None:
    kept.mark()
    for path in ("/health", "/health/live", "/"):
        assert kept.talk(request(f"GET {path}")).startswith(b"HTTP/1.1 200 ")
    assert kept.talk(request("GET /version", AUTH)).startswith(b"HTTP/1.1 200 ")
    (line,) = kept.lines()
    assert line["route"] == "/version"


def test_lost_lines_are_counted_and_told(kept: Watched) -> None:
    """A full disk costs lines, not answers; readiness stays, and says so."""
    audit = kept.running.server.audit
    assert audit is not None
    admin = {"Authorization": f"Bearer {ADMIN}"}
    url = kept.running.url
    assert httpx2.get(f"{url}/health").text == ""
    lost, usual = kept.counted("qnext_audit_lines_lost_total")["qnext_audit_lines_lost_total"], audit._fd
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        kept.running.call(lambda: setattr(audit, "_fd", full))
        assert httpx2.get(f"{url}/version", headers=admin).status_code == 200
        assert kept.counted("qnext_audit_lines_lost_total")["qnext_audit_lines_lost_total"] >= lost + 1
        ready = httpx2.get(f"{url}/health/ready", headers=admin)
        assert (ready.status_code, ready.json()) == (
            200,
            {"status": "ready", "degraded": ["the audit log loses lines"]},
        )
        answer = httpx2.get(f"{url}/health")
        assert (answer.status_code, answer.text) == (200, "degraded: the audit log loses lines\n")
        assert httpx2.get(f"{url}/health/live").json() == {"status": "ok"}
        status = httpx2.get(f"{kept.running.admin_url}/admin/status", headers=admin).json()
        assert (status["state"], status["degraded"]) == ("ready", ["the audit log loses lines"])
    finally:
        kept.running.call(lambda: setattr(audit, "_fd", usual))
        os.close(full)
    kept.mark()
    assert httpx2.get(f"{url}/version", headers=admin).status_code == 200
    kept.lines()
    assert httpx2.get(f"{url}/health").text == "" and httpx2.get(f"{url}/health/ready", headers=admin).json() == {
        "status": "ready"
    }


def test_who_reads_nothing_is_named(kept: Watched) -> None:
    """Also where the answers are no streams."""
    kept.mark()
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        one.connect(kept.address)
        one.sendall(request("GET /openapi.json", AUTH) * 400)
        found: list[dict[str, Any]] = []
        end = time.monotonic() + 20.0
        while not any(line["error_code"] for line in found) and time.monotonic() < end:
            time.sleep(0.1)
            found = kept.new_lines()
    assert 1 <= len(found) < 400 and {line["status"] for line in found} == {200}
    assert [line["error_code"] for line in found if line["error_code"]] == ["client_too_slow"]


def test_a_key_that_is_worth_nothing_any_more_is_named(chat_model: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    old, expired = store.create("old", expires=1)
    gone, revoked = store.create("gone")
    store.revoke(gone.id)
    log = AuditLog(tmp_path / "audit.jsonl")
    with running_server(chat_model, keys=KeyRing(tmp_path / "keys.json"), audit=log) as running:
        for secret in (expired, revoked, "wrong"):
            with running.client(secret) as client:
                assert client.get("/v1/models").status_code == 401
                assert client.get("/nothing").status_code == 404
    lines = list(map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines()))
    assert [line["key_id"] for line in lines] == [old.id, old.id, gone.id, gone.id, None, None]
    assert log.num_failed == 0
