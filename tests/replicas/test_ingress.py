"""The ingress before replicas that are functions: what passes through it, and what clients get when a replica dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not here")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from qnext.replicas.call import AnswerHead, RoutedCall
from qnext.replicas.figures import merged
from qnext.replicas.ingress import Ingress
from qnext.replicas.listening import OwnListener
from qnext.replicas.prefixes import chain_of
from qnext.server.access.keys import KeyRing
from qnext.server.limits import Limits
from qnext.server.run import Listen
from qnext.server.server import Server

Pieces = Callable[[RoutedCall], AsyncIterator[Any]]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Handle:
    """What Ray Serve's handle does for the ingress."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.calls: list[RoutedCall] = []
        self.num_cancelled = 0

    async def ask(self, call: RoutedCall) -> AsyncGenerator[Any, None]:
        self.calls.append(call)
        try:
            async for piece in self.pieces(call):
                yield piece
        finally:
            self.num_cancelled += 1


class Answered(list[dict[str, Any]]):
    """The ASGI messages of one answer."""

    @property
    def status(self) -> int:
        return int(self[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self[0]["headers"])

    @property
    def body(self) -> bytes:
        assert not self[-1]["more_body"] and all(message["more_body"] for message in self[1:-1])
        return b"".join(message["body"] for message in self[1:])


def ask(
    handle: Handle,
    path: str = "/v1/chat/completions",
    body: bytes = b"{}",
    *,
    keys: KeyRing | None = None,
    limits: Limits | None = None,
    **headers: str,
) -> Answered:
    answered = Answered()

    async def send(message: dict[str, Any]) -> None:
        answered.append(message)

    bodies = [{"type": "http.request", "body": body[:3], "more_body": True}, {"type": "http.request", "body": body[3:]}]

    async def receive() -> dict[str, Any]:
        if bodies:
            return bodies.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": raw,
        "client": ("1.2.3.4", 5),
        "state": object(),
    }
    asyncio.run(Ingress(keys or KeyRing(), limits or Limits(), handle, handle.ask)(scope, receive, send))
    return answered


def answering(*pieces: Any) -> Handle:
    """A replica that gives these pieces; an exception is raised in its place."""

    async def give(call: RoutedCall) -> AsyncIterator[Any]:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    return Handle(give)


def test_an_answer_passes_unchanged() -> None:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"mine")]
    handle = answering(AnswerHead(418, headers, b'{"a":', False), b"1", b"}")
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    answered = ask(handle, body=body, x_other="kept")
    assert (answered.status, answered.body) == (418, b'{"a":1}')
    assert answered.headers == dict(headers)
    (call,) = handle.calls
    assert call.body == body and call.chain == chain_of("", json.loads(body)) != ()
    assert call.scope["path"] == "/v1/chat/completions" and "state" not in call.scope
    assert (b"x-other", b"kept") in call.scope["headers"]


def test_the_request_has_one_id_here_and_in_the_replica() -> None:
    handle = answering(AnswerHead(200, [(b"x-request-id", b"abc")], b"", True))
    answered = ask(handle, x_request_id="abc")
    assert (b"x-request-id", b"abc") in handle.calls[0].scope["headers"]
    assert b"x-request-id" not in answered.headers, "the proxy adds it"
    ask(handle, x_request_id="not a name")
    (given,) = [value for name, value in handle.calls[1].scope["headers"] if name == b"x-request-id"]
    assert given.startswith(b"req-")


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", None), BackPressureError(1, 1)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_before_the_first_byte_a_lost_replica_is_503_to_be_tried_again(path: str, error: Exception) -> None:
    answered = ask(answering(error), path)
    assert answered.status == 503
    assert int(answered.headers[b"retry-after"]) >= 1
    assert b"x-request-id" in answered.headers and answered.headers[b"content-type"] == b"application/json"
    said = json.loads(answered.body)
    assert said["error"]["type"] == "overloaded_error"
    if path == "/v1/messages":
        assert said["type"] == "error"
    else:
        assert set(said["error"]) == {"message", "type", "param", "code"}


def test_after_the_first_byte_each_api_has_its_error_event() -> None:
    def ending(path: str, first: bytes) -> bytes:
        answered = ask(answering(AnswerHead(200, EVENTS, first, False), first, ActorDiedError()), path)
        assert answered.status == 200
        body = answered.body
        assert body.startswith(2 * first)
        return body[2 * len(first) :]

    chat = ending("/v1/chat/completions", b"data: {}\n\n")
    event, done = chat.strip().split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "replica_lost" and done == b"data: [DONE]"
    assert ending("/v1/completions", b"data: {}\n\n") == chat
    name, data = ending("/v1/messages", b"event: ping\ndata: {}\n\n").strip().split(b"\n")
    assert name == b"event: error" and json.loads(data.removeprefix(b"data: "))["error"]["type"] == "overloaded_error"
    name, data = ending("/v1/responses", b'event: e\ndata: {"sequence_number":41}\n\n').strip().split(b"\n")
    said = json.loads(data.removeprefix(b"data: "))
    assert name == b"event: error" and (said["type"], said["sequence_number"]) == ("error", 42)


def test_an_answer_that_is_no_stream_is_cut_off() -> None:
    """Its end is missing, so no client takes it for whole."""
    with pytest.raises(ConnectionAbortedError):
        ask(answering(AnswerHead(200, [], b"half", False), ActorDiedError()))


def test_a_fault_of_the_program_is_500_and_not_tried_again() -> None:
    answered = ask(answering(RayTaskError("f", "trace", ValueError("secret"))))
    assert answered.status == 500 and answered.headers[b"x-should-retry"] == b"false"
    assert b"secret" not in answered.body


def test_without_a_valid_key_nothing_is_read_and_nothing_learnt() -> None:
    handle = answering(AnswerHead(401, [], b"no", True))
    body = json.dumps({"prompt": "x"}).encode()
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x_api_key": "wrong"}):
        assert ask(handle, body=body, keys=KeyRing(plain=["right"]), **headers).status == 401
    assert [(call.body, call.chain) for call in handle.calls] == 3 * [(b"", ())]
    ring = KeyRing(plain=["right"])
    ask(handle, body=body, keys=ring, authorization="Bearer right")
    assert handle.calls[-1].chain == chain_of(ring.keys[0].id, {"prompt": "x"})


def test_bodies_have_a_bound() -> None:
    handle = answering(AnswerHead(200, [], b"", True))
    limits = Limits(max_body_bytes=10)
    assert ask(handle, body=b"x" * 11, limits=limits).status == 413
    assert ask(handle, body=b"", limits=limits, content_length="11").status == 413
    assert handle.calls == []
    assert ask(handle, body=b"x" * 10, limits=limits).status == 200, "what is no JSON is the replica's to refuse"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b'{"messages":[{"content":' + 300 * b"[" + 300 * b"]" + b"}]}",
        b'{"messages":' + 2_000 * b"[" + 2_000 * b"]" + b"}",
        b'{"prompt":"\\ud800"}',
        b'{"prompt":{"a":[1e999]},"tools":99999999999999999999999}',
    ],
)
def test_what_has_no_beginning_goes_to_a_replica_all_the_same(body: bytes) -> None:
    handle = answering(AnswerHead(400, [], b"no", True))
    assert ask(handle, body=body).status == 400
    assert handle.calls[0].body == body


def test_a_client_that_leaves_ends_the_call() -> None:
    handle = Handle(_endless)
    started = asyncio.Event()

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            if not started.is_set():
                started.set()
                return {"type": "http.request", "body": b"{}"}
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await asyncio.wait_for(Ingress(KeyRing(), Limits(), handle, handle.ask)(scope, receive, send), 60)

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run())
    assert handle.num_cancelled == 1


async def _endless(call: RoutedCall) -> AsyncIterator[Any]:
    yield AnswerHead(200, EVENTS, b"", False)
    await asyncio.sleep(3600)


def test_the_own_listener_ends_without_losing_an_answer() -> None:
    """It takes no more connections, and what runs goes on."""
    may_end = asyncio.Event()

    async def slow(call: RoutedCall) -> AsyncIterator[Any]:
        yield AnswerHead(200, EVENTS, b"first ", False)
        await may_end.wait()
        yield b"last"

    async def run() -> bytes:
        server = Server(limits=Limits(), with_page=False)
        handle = Handle(slow)
        ingress = Ingress(KeyRing(), server.limits, handle, handle.ask, is_behind_proxy=False)
        own = OwnListener(ingress, server, Listen(port=0))
        own.start()
        port = own.port
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        assert (await reader.readuntil(b"first ")).startswith(b"HTTP/1.1 200 ")
        stopping = asyncio.create_task(own.stop())
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert not stopping.done()
        may_end.set()
        rest = await reader.readuntil(b"0\r\n\r\n")
        await asyncio.wait_for(stopping, 60)
        writer.close()
        return rest

    assert b"last" in asyncio.run(run())


def test_metrics_of_replicas_are_one_text() -> None:
    one = '# HELP a_total As\n# TYPE a_total counter\na_total 1.0\n# HELP b B\n# TYPE b gauge\nb{x="1"} 2.0\n'
    assert merged({"r1": one, "r2": one.replace("2.0", "3.0")}) == (
        '# HELP a_total As\n# TYPE a_total counter\na_total{replica="r1"} 1.0\na_total{replica="r2"} 1.0\n'
        '# HELP b B\n# TYPE b gauge\nb{replica="r1",x="1"} 2.0\nb{replica="r2",x="1"} 3.0\n'
    )
