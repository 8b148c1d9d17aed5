"""Under which names a server answers, and whose pages may ask it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.server.access.hosts import AllowedHosts, parse_host, same_origin
from qnext.server.access.keys import KeyRing
from tests.server.serving import Running, running_server

FRIEND = "https://friend.example"
BODY = {"prompt": "Hi", "max_tokens": 1}


def allows(hosts: AllowedHosts, text: str, *, needs_key: bool = False) -> bool:
    host = parse_host(text)
    assert host is not None, text
    return hosts.allows(host, needs_key=needs_key)


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("localhost", "localhost", None),
        ("LocalHost.", "localhost", None),
        ("a_b.Example:80", "a_b.example", 80),
        ("a:", "a", None),
        ("127.0.0.1:8000", "127.0.0.1", 8000),
        ("[::1]", "::1", None),
        ("[FD00::1]:443", "fd00::1", 443),
    ],
)
def test_a_host_is_read(text: str, name: str, port: int | None) -> None:
    host = parse_host(text)
    assert host is not None and (host.name, host.port) == (name, port)
    assert (host.address is not None) == (":" in name or name[0].isdigit())


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        ":80",
        "a:b",
        "a:65536",
        "a:123456",
        "a@b",
        "a/b",
        "a b",
        "a,b",
        "::1",
        "[::1",
        "[::1]x",
        "[1.2.3.4]",
        "[localhost]",
        "[fe80::1%eth0]",
        "http://a",
        "a\tb",
        "ä.example",
        "a" * 255,
        "a\x00",
    ],
)
def test_what_is_no_host(text: str) -> None:
    assert parse_host(text) is None


@given(st.text(max_size=40))
def test_any_text_is_read_or_not(text: str) -> None:
    host = parse_host(text)
    assert host is None or (host.name == host.name.lower() and host.name)


def test_without_keys_on_loopback_only_loopback_is_a_name() -> None:
    hosts = AllowedHosts("127.0.0.1")
    for text in ("localhost", "localhost:9", "127.0.0.1", "127.255.0.3", "[::1]:8000", "[::ffff:127.0.0.1]"):
        assert allows(hosts, text), text
    for text in (
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "[::]",
        "127.0.0.1.nip.io",
        "127.1",
        "2130706433",
        socket.gethostname(),
        "sub.localhost",
    ):
        assert not allows(hosts, text), text


def test_addresses_are_names_where_keys_are_needed_or_everybody_is_let_in() -> None:
    for bound in ("0.0.0.0", "::", "192.168.1.5"):
        hosts = AllowedHosts(bound)
        for text in (
            "10.2.3.4",
            "[fd00::7]:8000",
            socket.gethostname(),
            f"{socket.gethostname().partition('.')[0]}.local",
        ):
            assert allows(hosts, text) and allows(hosts, text, needs_key=True), text
        assert not allows(hosts, "evil.example", needs_key=True) and not allows(hosts, "0.0.0.0")
    assert allows(AllowedHosts("127.0.0.1"), "10.2.3.4", needs_key=True)
    assert allows(AllowedHosts("gpu7"), "GPU7:8000")


def test_names_are_given() -> None:
    hosts = AllowedHosts("127.0.0.1", ["llm.Example.org., *.team.example", "box:8080", "[fd00::1]", "10.0.0.9"])
    for text in (
        "llm.example.org",
        "LLM.example.org:443",
        "a.team.example",
        "a.b.team.example.",
        "box:8080",
        "[fd00::1]:1",
        "10.0.0.9",
    ):
        assert allows(hosts, text), text
    for text in (
        "example.org",
        "x.llm.example.org",
        "team.example",
        "ateam.example",
        "box",
        "box:80",
        "10.0.0.8",
        ".team.example",
    ):
        assert not allows(hosts, text), text
    assert allows(AllowedHosts("127.0.0.1", ["*"]), "evil.example")


def test_a_unix_socket_has_any_name_unless_some_are_given() -> None:
    assert allows(AllowedHosts(None), "anything") and not allows(AllowedHosts(None, ["llm"]), "anything")
    assert allows(AllowedHosts(None, ["llm"]), "llm") and allows(AllowedHosts(None, ["llm"]), "localhost")


@pytest.mark.parametrize(
    "text", ["", "a,,b", "http://a", "a/b", "a b", "*.", "*a.example", "*.1.2.3.4", "a.*", "**", "a:b", "a@b"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--allowed-hosts"):
        AllowedHosts("127.0.0.1", [text])


@pytest.mark.parametrize(
    ("origin", "host", "is_same"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://localhost", "localhost:8000", False),
        ("http://localhost", "localhost", True),
        ("https://a.example", "a.example", True),
        ("https://a.example", "a.example:443", True),
        ("https://a.example:8443", "a.example", False),
        ("http://127.0.0.1:8000", "localhost:8000", False),
        ("http://[::1]:80", "[::1]", True),
        ("null", "localhost", False),
        ("http://evil.example", "localhost", False),
        ("ftp://localhost", "localhost", False),
        ("http://", "localhost", False),
        ("http://localhost@evil.example", "localhost", False),
        ("localhost", "localhost", False),
        ("http://localhost/", "localhost", False),
    ],
)
def test_the_same_origin(origin: str, host: str, is_same: bool) -> None:
    found = parse_host(host)
    assert found is not None and same_origin(origin, found) == is_same


@pytest.fixture(scope="module")
def open_server(chat_model: Path) -> Iterator[Running]:
    """No keys: what a page on the web would reach."""
    with running_server(chat_model, origins=[FRIEND], allowed_hosts=["llm.example"]) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(chat_model: Path) -> Iterator[Running]:
    with running_server(chat_model, keys=KeyRing(plain=["user"], admin=["admin"])) as running:
        yield running


def test_a_rebound_name_reaches_nothing(open_server: Running, keyed: Running) -> None:
    """On no route of either listener, whatever it is."""
    headers = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "Authorization": "Bearer admin"}
    asked = [
        ("GET", "/"),
        ("GET", "/health/live"),
        ("GET", "/live/stream"),
        ("GET", "/v1/models"),
        ("GET", "/nothing"),
        ("POST", "/v1/completions"),
        ("POST", "/admin/drain"),
        ("OPTIONS", "/v1/models"),
    ]
    with httpx2.Client(headers=headers) as client:
        for base in (open_server.url, open_server.admin_url, keyed.url, keyed.admin_url):
            for method, path in asked:
                answer = client.request(method, base + path, json=BODY if method == "POST" else None)
                assert answer.status_code == 421, (method, path)
                assert answer.json()["error"]["code"] == "host_not_allowed" and "evil" not in answer.text
                assert "access-control-allow-origin" not in answer.headers


def test_its_own_names_reach_it(open_server: Running) -> None:
    port = open_server.url.rpartition(":")[2]
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "llm.example"):
        assert httpx2.get(f"{open_server.url}/v1/models", headers={"Host": host}).status_code == 200, host


def post(running: Running, **headers: str) -> int:
    return int(httpx2.post(f"{running.url}/v1/completions", json=BODY, headers=headers).status_code)


def test_only_pages_of_ours_and_of_friends_may_ask(open_server: Running) -> None:
    own = open_server.url
    assert post(open_server) == post(open_server, Origin=own) == post(open_server, Origin=FRIEND) == 200
    assert post(open_server, Origin=own, **{"Sec-Fetch-Site": "same-origin"}) == 200
    assert post(open_server, Origin=FRIEND, **{"Sec-Fetch-Site": "cross-site"}) == 200
    assert post(open_server, **{"Sec-Fetch-Site": "none"}) == 200
    for origin in (
        "https://evil.example",
        "null",
        "http://localhost:1",
        "https://friend.example.evil.example",
        "",
        "file://",
    ):
        assert post(open_server, Origin=origin) == 403, origin
    for site in ("cross-site", "same-site"):
        assert post(open_server, **{"Sec-Fetch-Site": site}) == 403
        assert post(open_server, **{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}) == 403, "a form"


def get(running: Running, path: str, **headers: str) -> int:
    with httpx2.stream("GET", running.url + path, headers=headers) as answer:
        return int(answer.status_code)


def test_a_page_from_elsewhere_opens_no_stream_and_a_link_leads_here(open_server: Running) -> None:
    for path in ("/live/stream", "/live/model", "/metrics", "/v1/models"):
        assert get(open_server, path) == get(open_server, path, Origin=FRIEND) == 200
        assert get(open_server, path, Origin="https://evil.example") == 403
        elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert get(open_server, path, **elsewhere) == 403
    assert get(open_server, "/", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}) == 200


def test_preflights(open_server: Running) -> None:
    def ask(origin: str) -> Any:
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
        }
        return httpx2.options(f"{open_server.url}/v1/completions", headers=headers)

    answer = ask(FRIEND)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, FRIEND)
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-lang"
    for origin in ("https://evil.example", "null"):
        answer = ask(origin)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_a_form_cannot_send_what_is_read(open_server: Running) -> None:
    """Bodies that a page may send without asking first are no JSON here."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        answer = httpx2.post(
            f"{open_server.url}/v1/completions", content=b'{"prompt":"Hi"}', headers={"Content-Type": kind}
        )
        assert answer.status_code == 415
