"""What a byte waits for between the server and its client: nothing, with acknowledgements that come late too."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qnext.server.http.protocol import PatientProtocol
from qnext.server.limits import Limits
from qnext.server.run import Listen, serving
from qnext.server.server import Server
from tests.server.serving import Running, load_engine

DELAYED_ACK = 0.040  # seconds, the least that Linux waits with an acknowledgement
GREEDY = {"prompt": "Once", "temperature": 0, "ignore_eos": True}


def connect(url: str) -> socket.socket:
    """A client's connection that acknowledges late, as those do that have nothing to say."""
    host, _, port = url.partition("://")[2].rpartition(":")
    one = socket.create_connection((host.strip("[]"), int(port)), timeout=20.0)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
    return one


def request(body: dict[str, Any] | None = None) -> bytes:
    if body is None:
        return b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def pieces(one: socket.socket, end: bytes) -> list[bytes]:
    """What comes, as it comes, until it ends so."""
    found = [b""]
    while not b"".join(found[-2:]).endswith(end):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        found.append(one.recv(1 << 20))
        assert found[-1], found
    return found[1:]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    names = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-subj", "/CN=localhost"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([program, "req", *kind, *names], check=True, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """The sockets of connections that servers of this process accept meanwhile."""
    found: list[socket.socket] = []
    usual = PatientProtocol.connection_made

    def connection_made(self: PatientProtocol, transport: Any) -> None:
        found.append(transport.get_extra_info("socket"))
        usual(self, transport)

    monkeypatch.setattr(PatientProtocol, "connection_made", connection_made)
    return found


def served(listen: Listen, folder: Path, accepted: list[socket.socket]) -> Iterator[socket.socket]:
    """The server's side of a connection to each of its listeners, after answers through it."""
    limits = Limits(drain_seconds=0.1, write_seconds=20.0)
    stream = request({**GREEDY, "max_tokens": 50, "stream": True})
    with serving(lambda: Server(limits=limits), lambda: load_engine(folder), listen) as (_, urls):
        for url in (urls.public, urls.admin):
            assert url is not None
            one = connect(url)
            if url.startswith("https"):
                one = context(listen).wrap_socket(one, server_hostname="localhost")
            with one:
                one.sendall(request())
                assert b"".join(pieces(one, b"}")).startswith(b"HTTP/1.1 ")
                if url == urls.public:
                    one.sendall(stream)
                    assert b"".join(pieces(one, b"0\r\n\r\n")).count(b'"text":') > 20
                yield accepted[-1]


def context(listen: Listen) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=listen.certificate)


@pytest.mark.parametrize("kind", ["IPv4", "IPv6", "all interfaces", "TLS"])
def test_accepted_sockets_wait_for_nothing(
    kind: str, chat_model: Path, accepted: list[socket.socket], request: pytest.FixtureRequest
) -> None:
    host = {"IPv6": "::1", "all interfaces": "0.0.0.0"}.get(kind, "127.0.0.1")
    files = request.getfixturevalue("certificate") if kind == "TLS" else (None, None)
    if kind == "IPv6":
        try:
            socket.socket(socket.AF_INET6).bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    listen = Listen(host, 0, admin_port=0, certificate=files[0], certificate_key=files[1])
    number = 0
    for one in served(listen, chat_model, accepted):
        number += 1
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Whoever is gone without a word is noticed, but later than one that only does not read.
            assert 20_000 < one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000
    assert number == 2


def test_small_requests_of_a_kept_connection_do_not_wait_for_acknowledgements(server: Running) -> None:
    seconds = []
    with connect(server.url) as one:
        for _ in range(40):
            began = time.perf_counter()
            one.sendall(request())
            pieces(one, b'{"status":"ok"}')
            seconds.append(time.perf_counter() - began)
    assert min(seconds[20:]) < DELAYED_ACK / 2, seconds


def test_tokens_do_not_come_in_clumps(server: Running) -> None:
    """At the client in as many pieces as there are tokens, but for those that a busy machine puts together."""
    shares = [0.0]
    with connect(server.url) as one:
        while len(shares) < 12 and max(shares) <= 0.7:
            one.sendall(request({**GREEDY, "max_tokens": 100, "stream": True}))
            sizes = [piece.count(b'"text":') for piece in pieces(one, b"0\r\n\r\n")]
            shares.append(sum(map(bool, sizes)) / sum(sizes))
    assert max(shares) > 0.7, shares


def test_a_whole_answer_is_one_write(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write is a system call, a packet, and a client that wakes up."""
    sent: list[int] = []
    usual = socket.socket.send

    def send(self: socket.socket, data: bytes, *flags: int) -> int:
        if len(data) > 1:  # or it wakes an event loop
            sent.append(len(data))
        return usual(self, data, *flags)

    monkeypatch.setattr(socket.socket, "send", send)
    with connect(server.url) as one:
        for sample in (request(), request({**GREEDY, "max_tokens": 4})):
            sent.clear()
            one.sendall(sample)
            found = b"".join(pieces(one, b"}"))
            assert sent == [len(found)]
        sent.clear()
        one.sendall(request({**GREEDY, "max_tokens": 1, "stream": True}))
        answer = b"".join(pieces(one, b"0\r\n\r\n"))
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert sum(sent) == len(answer) and len(sent) <= 3, sent


def test_writes_keep_their_order(server: Running) -> None:
    """Requests sent ahead, one connection: each answer whole, none before the other."""
    with connect(server.url) as one:
        one.sendall(request({**GREEDY, "max_tokens": 3}) + request() + request({**GREEDY, "max_tokens": 2}) + request())
        found = b""
        while found.count(b'{"status":"ok"}') < 2:
            found += one.recv(1 << 20)
    marks = [mark for _, mark in sorted(itertools.chain(places(found, b'"usage"'), places(found, b'"status"')))]
    assert marks == [b'"usage"', b'"status"'] * 2
    assert found.count(b"HTTP/1.1 200") == 4


def places(text: bytes, mark: bytes) -> Iterator[tuple[int, bytes]]:
    at = text.find(mark)
    while at >= 0:
        yield at, mark
        at = text.find(mark, at + 1)


def test_a_body_that_is_refused_is_read_as_long_as_it_comes(server: Running) -> None:
    """Its sender sees the answer and goes on with the connection; one that falls silent holds none."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow, silent = connect(server.url), connect(server.url)
    with slow, silent:
        for one in (slow, silent):
            one.sendall(head + b"Content-Length: 9000000\r\n\r\n{")
            assert one.recv(1 << 16).startswith(b"HTTP/1.1 413")
        for piece in (1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000, 3_999_999):  # for longer than it waits
            time.sleep(0.45)
            slow.sendall(b" " * piece)
        slow.sendall(request())
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200")
        silent.settimeout(5.0)
        with contextlib.suppress(ConnectionResetError):  # as there was something unread
            assert not silent.recv(1 << 16)
