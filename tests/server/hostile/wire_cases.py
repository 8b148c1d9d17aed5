"""Hostile bytes on a connection, as data."""

from __future__ import annotations

from tests.server.hostile.surfaces import MARK
from tests.server.hostile.wire import AUTH, CLOSED, VALID, Bytes, chunked, get, post

_TE = "Transfer-Encoding: chunked\r\n"
_SECOND = get("/version", AUTH)

REQUESTS = [
    Bytes("valid", (post(),), (200,)),
    Bytes("valid, chunked", (post(chunked(VALID, 7), _TE, length=False),), (200,)),
    Bytes("valid, byte by byte", tuple(bytes([byte]) for byte in post()), (200,)),
    Bytes("Expect: 100-continue", (post(headers="Expect: 100-continue\r\n"),), (100,), num_answers=2),
    Bytes("Expect: of nobody", (post(headers="Expect: 200-maybe\r\n"),), (200, 417)),
    Bytes(
        "Expect: 100-continue and no key",
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n",),
        (401,),
    ),
    # two ideas of where the body ends
    Bytes("length and chunked", (post(b"0\r\n\r\n" + _SECOND, _TE),), closes=True),
    Bytes(
        "chunked and length, other order",
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + _SECOND,
        ),
        closes=True,
    ),
    Bytes("two lengths", (post(headers="Content-Length: 3\r\n"),), closes=True),
    Bytes("two equal lengths", (post(headers=f"Content-Length: {len(VALID)}\r\n"),), (200, 400)),
    Bytes("a length with a comma", (post(b"{}", "Content-Length: 2, 3\r\n", length=False),), closes=True),
    Bytes("a negative length", (post(b"{}", "Content-Length: -1\r\n", length=False),), closes=True),
    Bytes("a signed length", (post(b"{}", "Content-Length: +2\r\n", length=False),), closes=True),
    Bytes("a length in hex", (post(b"{}", "Content-Length: 0x2\r\n", length=False),), closes=True),
    Bytes("a length of words", (post(b"{}", f"Content-Length: {MARK}\r\n", length=False),), closes=True),
    Bytes("an empty length", (post(b"{}", "Content-Length: \r\n", length=False),), closes=True),
    Bytes("a length of 5,000 digits", (post(b"{}", f"Content-Length: {'9' * 5_000}\r\n", length=False),), (400, 413)),
    Bytes("a length above the limit", (post(b"{}", "Content-Length: 8388609\r\n", length=False),), (413,)),
    Bytes("one byte above the limit", (post(b"a" * 8_388_609),), (413,), is_heavy=True),
    Bytes(
        "one byte above the limit, chunked",
        (post(chunked(b"a" * 8_388_609, 65_536), _TE, length=False),),
        (413,),
        seconds=3.0,
        is_heavy=True,
    ),
    Bytes(
        "chunked twice",
        (post(chunked(VALID, 9), "Transfer-Encoding: chunked, chunked\r\n", length=False),),
        (400, 501),
        closes=True,
    ),
    Bytes(
        "chunked under another name",
        (post(chunked(VALID, 9), "Transfer-Encoding: xchunked\r\n", length=False),),
        (400, 501),
        closes=True,
    ),
    Bytes(
        "gzip and chunked",
        (post(chunked(VALID, 9), "Transfer-Encoding: gzip, chunked\r\n", length=False),),
        (400, 501),
        closes=True,
    ),
    Bytes(
        "chunked with a tab", (post(chunked(VALID, 9), "Transfer-Encoding:\tchunked\r\n", length=False),), (200, 400)
    ),
    Bytes("a space before the colon", (post(headers="Content-Type : text/plain\r\n"),), closes=True),
    Bytes("a folded header", (get(headers="X-A: 1\r\n 2\r\n"),), (200, 400)),
    Bytes("a header without a name", (get(headers=": x\r\n"),), closes=True),
    Bytes("a header without a colon", (get(headers=f"{MARK}\r\n"),), closes=True),
    Bytes("NUL in a header", (get(headers="X-A: a\x00b\r\n"),), closes=True),
    Bytes("a bare CR in a header", (get(headers="X-A: a\rb\r\n"),), closes=True),
    Bytes("two hosts", (get(headers="Host: y\r\n"),), closes=True),
    Bytes("no host", (b"GET /health/live HTTP/1.1\r\n\r\n",), closes=True),
    # chunks
    Bytes("a chunk of bad size", (post(b"zz\r\nhello\r\n0\r\n\r\n", _TE, length=False),), (400, CLOSED), closes=True),
    Bytes("a negative chunk", (post(b"-1\r\nhello\r\n", _TE, length=False),), (400, CLOSED), closes=True),
    Bytes(
        "a chunk of 2^64",
        (post(b"fffffffffffffffff\r\nhello", _TE, length=False),),
        (400, 408, 413, CLOSED),
        closes=True,
        seconds=3.5,
    ),
    Bytes("a chunk without its end", (post(b"2\r\n{}XX0\r\n\r\n", _TE, length=False),), (400, CLOSED), closes=True),
    Bytes(
        "a chunk with a long extension",
        (post(b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", _TE, length=False),),
        (400, CLOSED),
    ),
    Bytes(
        "hidden trailers",
        (post(chunked(VALID, 9)[:-2] + b"Content-Length: 1\r\nAuthorization: x\r\n\r\n", _TE, length=False),),
        (200, 400),
    ),
    Bytes(
        "200,000 chunks of a byte",
        (post(chunked(b" " * 200_000 + VALID, 1), _TE, length=False),),
        (400, CLOSED),
        closes=True,
        is_heavy=True,
    ),
    # headers in number and size
    Bytes("101 headers", (get(headers="".join(f"X-{i}: 1\r\n" for i in range(101))),), (431,), closes=True),
    Bytes(
        "10,000 headers", (get(headers="".join(f"a{i}:\r\n" for i in range(10_000))),), (400, 431, CLOSED), closes=True
    ),
    Bytes("a header of 1 MB", (get(headers=f"X-A: {MARK * 100_000}\r\n"),), (400, 431, CLOSED), closes=True),
    Bytes(
        "a header of 50 MB",
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ", *[b"a" * 1_048_576] * 50),
        (400, 431, CLOSED),
        closes=True,
        seconds=3.0,
        is_heavy=True,
    ),
    Bytes("a target of 100 KB", (get("/" + "a" * 100_000),), (400, 404, 414, 431, CLOSED)),
    Bytes("a target of 3,000", (get("/" + "a" * 3_000),), (404,)),
    Bytes("a query of 60 KB", (get("/health/live?" + "a=b&" * 15_000),), (200, 431)),
    # versions, methods, targets
    Bytes("HTTP/0.9", (b"GET /health/live\r\n\r\n",), closes=True),
    Bytes("HTTP/1.0", (b"GET /health/live HTTP/1.0\r\n\r\n",), (200,), closes=True),
    Bytes("HTTP/2.0", (get(version="HTTP/2.0"),), (400, 505), closes=True),
    Bytes("HTTP/9.9", (get(version="HTTP/9.9"),), (400, 505), closes=True),
    Bytes("the preface of HTTP/2", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), (400, 505), closes=True),
    Bytes("TLS", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,), closes=True),
    Bytes("random bytes", (bytes(range(256)) * 4,), closes=True),
    Bytes("only line ends", (b"\r\n" * 5_000,), (400, CLOSED), closes=True, seconds=3.5),
    Bytes("bare line feeds", (b"GET /health/live HTTP/1.1\nHost: localhost\n\n",), (200, 400)),
    Bytes("a lower-case method", (b"get /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n",), (400, 405)),
    Bytes("a method of nobody", (f"{MARK} /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),), (400, 405)),
    Bytes("CONNECT", (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",), (400, 404, 405)),
    Bytes("TRACE", (get(headers=f"X-Secret: {MARK}\r\n").replace(b"GET /health/live", b"TRACE /v1/models"),), (405,)),
    Bytes("OPTIONS *", (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",), (400, 404, 405)),
    Bytes("an absolute target", (get("http://evil.example/v1/models", AUTH),), (421,), closes=True),
    Bytes("an absolute target of ours", (get("http://localhost:80/v1/models?a=b", AUTH),), (200,)),
    Bytes("an absolute target without a path", (get("http://localhost"),), (200, 404)),
    Bytes("an absolute target with a user", (get("http://localhost@evil.example/v1/models", AUTH),), closes=True),
    Bytes(
        "an absolute target and a host of another",
        (get("http://localhost/version").replace(b"Host: localhost", b"Host: a.example"),),
        (421,),
        closes=True,
    ),
    *(
        Bytes(f"host {host}", (f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),), (421,), closes=True)
        for host in (
            "evil.example",
            "localhost.evil.example",
            "evil.example:8000",
            "127.0.0.1.nip.io",
            "2130706433",
            "0x7f000001",
            "127.1",
            "localhost..",
            "xn--lcalhost-6jg",
        )
    ),
    *(
        Bytes(f"host {host}", (f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),), closes=True)
        for host in (
            "",
            "localhost:x",
            "localhost:99999",
            "a@localhost",
            "localhost/",
            "[::1",
            "[::1]x",
            "[localhost]",
            "localhost, evil.example",
            "localhost evil.example",
            "http://localhost",
            "[fe80::1%25eth0]",
        )
    ),
    *(
        Bytes(f"host {host}", (f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),), (200,))
        for host in (
            "LOCALHOST",
            "localhost.",
            "localhost:",
            "localhost:1",
            "127.0.0.1",
            "127.1.2.3:80",
            "[::1]:8000",
            "[::ffff:127.0.0.1]",
            "10.0.0.5:8000",
            "[fd00::5]",
        )
    ),
    Bytes("a target of two slashes", (get("//v1/models", AUTH),), (404,)),
    Bytes("a target with a fragment", (get("/health/live#x"),), (200, 400, 404)),
    Bytes("a target with a backslash", (get("/v1\\models", AUTH),), (400, 404)),
    Bytes("a target with NUL", (get("/page/%00index.html"),), (404,)),
    Bytes("a target with a line end", (get("/page/%0d%0aSet-Cookie:x=1"),), (404,)),
    Bytes("a target with bad UTF-8", (get("/page/%ff%fe"),), (404,)),
    Bytes("a target with a bad escape", (get("/page/%zz"),), (404,)),
    Bytes("raw bytes in a target", (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",), (400, 404)),
    *(
        Bytes(f"traversal {target}", (get(target),), (404,))
        for target in (
            "/page/../../pyproject.toml",
            "/page/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "/page/..%2f..%2fguard.py",
            "/page/..%5c..%5cguard.py",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/page//etc/passwd",
            "/page/....//....//etc/passwd",
            "/page/%252e%252e/guard.py",
            "/page/./__init__.py",
            "/page/.git/config",
            "/page/%c0%ae%c0%ae/x",
            "/static/../page/index.html",
            "/page/file:///etc/passwd",
        )
    ),
    Bytes(
        "a range bomb",
        (get("/health/live", "Range: bytes=" + ",".join(f"{i}-" for i in range(9_000)) + "\r\n"),),
        (200,),
    ),
    Bytes(
        "an upgrade to a websocket",
        (
            get(
                "/v1/models",
                f"{AUTH}Connection: Upgrade\r\nUpgrade: websocket\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n",
            ),
        ),
        (200, 400, 426),
    ),
    Bytes(
        "an upgrade to HTTP/2",
        (
            get(
                "/v1/models",
                f"{AUTH}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
            ),
        ),
        (200, 400),
    ),
    # what is read of a connection, and how long
    Bytes("pipelined", (get() * 3,), (200,), num_answers=3),
    Bytes("pipelined behind a completion", (post() + get(),), (200,), num_answers=2),
    Bytes(
        "a megabyte sent ahead of an answer",
        (post(b'{"prompt":"Hi","max_tokens":1500,"ignore_eos":true}'), 0.02, *[b"x" * 65_536] * 16),
        (CLOSED, 200),
        num_answers=2,
        closes=True,
        seconds=3.0,
    ),
    Bytes(
        "headers that do not come",
        (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n",),
        (CLOSED,),
        closes=True,
        seconds=4.0,
    ),
    Bytes("nothing", (), (CLOSED,), closes=True, seconds=4.0),
    Bytes(
        "headers that come slowly",
        (b"GET /health/live HTTP/1.1\r\n", *[b"X: 1\r\n", 0.2] * 8),
        (CLOSED,),
        closes=True,
        seconds=4.0,
    ),
    Bytes(
        "second headers that come slowly",
        (get(), 0.1, b"GET /health", *[b"a", 0.2] * 8),
        (200,),
        closes=True,
        seconds=5.0,
    ),
    Bytes(
        "a body that does not come",
        (post(b"{", "Content-Length: 500\r\n", length=False),),
        (408,),
        closes=True,
        seconds=4.0,
    ),
    Bytes(
        "a body that comes slowly",
        (post(b"{", "Content-Length: 500\r\n", length=False), *[b" ", 0.2] * 8),
        (408,),
        closes=True,
        seconds=5.0,
    ),
    Bytes(
        "a body that nobody reads and that never ends",
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n", *[b" ", 0.3] * 12),
        (401,),
        closes=True,
        seconds=6.0,
    ),
    Bytes("half closed", (post(),), (200, CLOSED), closes=True, half_closes=True),
    Bytes(
        "half closed in the body",
        (post(b"{", "Content-Length: 500\r\n", length=False),),
        (CLOSED, 400),
        closes=True,
        half_closes=True,
    ),
]
