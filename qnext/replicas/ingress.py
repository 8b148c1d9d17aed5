"""The address of several replicas: reads a request, has it routed, and passes the pieces of the answer on.

A replica that dies takes its running requests with it. Their clients get an error that they can retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from qnext.replicas.call import AnswerHead, AskReplica, RoutedCall
from qnext.replicas.direct import ReplicaLost
from qnext.replicas.figures import merged
from qnext.replicas.prefixes import chain_of
from qnext.replicas.wire import ReplicaFailed
from qnext.server.access.keys import KeyRing
from qnext.server.access.rates import network_of
from qnext.server.errors import ApiError, error_body, error_object, style_of
from qnext.server.http.guard import SAFE_HEADERS, Headers
from qnext.server.http.reading import ClientGone, Receive, Send, check_length, disconnected, read_all
from qnext.server.lanes import LARGE, Budget
from qnext.server.limits import MAX_HELD_BYTES, MAX_HELD_BYTES_PER_KEY, Limits
from qnext.server.requests import new_request_id
from qnext.server.server import secret_of
from qnext.server.surfaces.writing import data_frames, named_frames

_log = logging.getLogger("qnext.replicas")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")
_METRICS = "/metrics"
_SEQUENCE = re.compile(rb'"sequence_number": ?(\d+)')


class Ingress:
    """An ASGI application before replicas. `replicas` is Ray Serve's handle of the deployment of `Replica`, and `ask`
    gives the pieces of an answer.

    `keys` and `limits` are those of the replicas. What a request may do is decided there; here a key is whose prefixes
    a request may find, and a limit how much is read.
    """

    def __init__(
        self, keys: KeyRing, limits: Limits, replicas: Any, ask: AskReplica, *, is_behind_proxy: bool = True
    ) -> None:
        """`is_behind_proxy`: Ray Serve's proxy listens, which tells clients the ids that it has seen."""
        self._keys = keys
        self._is_behind_proxy = is_behind_proxy
        self._limits = limits
        self.num_running = 0
        self._replicas = replicas
        self._ask = ask
        most = max(MAX_HELD_BYTES_PER_KEY, limits.max_body_bytes)
        self._bodies = Budget(most=max(MAX_HELD_BYTES, most), per_owner=most)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        headers = _named(scope["headers"])
        given = headers.get("x-request-id", "")
        reply = _Reply(send, scope["path"], given if _REQUEST_ID.fullmatch(given) else new_request_id())
        reply.is_named = self._is_behind_proxy and reply.request_id == given
        key = None if self._keys.is_open else self._keys.find(secret_of(headers) or "")
        is_known = self._keys.is_open or key is not None
        payer = f"key {key.id}" if key is not None else network_of((scope.get("client") or ("",))[0])
        held = 0
        self.num_running += 1
        try:
            # Without a valid key nothing is read: the replica refuses before it looks at the body.
            body = await self._read(headers, receive, payer) if is_known and scope["method"] == "POST" else b""
            held = len(body)
            chain = await _chain(key.id if key is not None else "", body) if body else ()
            call = RoutedCall(_data_of(scope, reply.request_id), body, chain)
            await self._answer(call, receive, reply)
        except ClientGone:
            return
        except ApiError as error:
            await reply.fail(error)
        finally:
            self.num_running -= 1
            self._bodies.give_back(payer, held)

    def reload_keys(self) -> None:
        """Read the file of keys again where it has changed."""
        problem = self._keys.reload_if_changed()
        if problem is not None:
            _log.warning("keys not reloaded: %s", problem)

    async def _read(self, headers: Mapping[str, str], receive: Receive, payer: str) -> bytes:
        limit, held = self._limits.max_body_bytes, 0
        check_length(headers, limit)

        def take(num_bytes: int) -> None:
            nonlocal held
            self._bodies.take(payer, num_bytes)
            held += num_bytes

        try:
            return await asyncio.wait_for(read_all(receive, limit, take), self._limits.body_seconds)
        except BaseException as error:
            self._bodies.give_back(payer, held)
            if isinstance(error, asyncio.TimeoutError):
                raise ApiError(408, "the body did not come in time") from None
            raise

    async def _answer(self, call: RoutedCall, receive: Receive, reply: _Reply) -> None:
        passing = asyncio.ensure_future(self._pass_on(call, reply))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((passing, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not passing.done():
                passing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((passing,))
        if not passing.cancelled():
            passing.result()

    async def _pass_on(self, call: RoutedCall, reply: _Reply) -> None:
        try:
            if call.scope["path"] == _METRICS:
                await reply.take(await self._metrics(call))
                return
            async with contextlib.aclosing(self._ask(call)) as pieces:
                async for piece in pieces:
                    await reply.take(piece)
            await reply.end()
        except (RayError, BackPressureError, DeploymentUnavailableError, ReplicaLost, ReplicaFailed) as error:
            raise self._fault(error, reply) from error

    async def _metrics(self, call: RoutedCall) -> AnswerHead:
        """The metrics of all replicas, or the first refusal."""
        answers: dict[str, AnswerHead] = dict(await self._replicas.broadcast("whole", call).results_async())
        for begin in answers.values():
            if begin.status != 200:
                return begin
        first = next(iter(answers.values()))
        body = merged({name: begin.body.decode() for name, begin in answers.items()}).encode()
        headers = [(name, value) for name, value in first.headers if name != b"content-length"]
        return first._replace(body=body, headers=[*headers, (b"content-length", b"%d" % len(body))])

    def _fault(self, error: Exception, reply: _Reply) -> ApiError:
        retry = float(self._limits.retry_seconds)
        if isinstance(error, BackPressureError):
            return ApiError.busy("too many requests wait", retry_after=retry)
        is_of_task = isinstance(error, RayTaskError) and not isinstance(error, RayActorError)
        if is_of_task or isinstance(error, ReplicaFailed):
            _log.error("request %s failed: %s", reply.request_id, error)
            return ApiError.internal()
        _log.warning("request %s lost its replica: %s", reply.request_id, type(error).__name__)
        return ApiError.busy(
            "the replica that had this request has ended; try again", retry_after=retry, code="replica_lost"
        )


class _Reply:
    """What the client of one request gets."""

    is_named = False  # somebody else tells the client the request's id

    def __init__(self, send: Send, path: str, request_id: str) -> None:
        self.request_id = request_id
        self._send = send
        self._path = path
        self._style = style_of(path)
        self._has_begun = self._has_ended = self._is_stream = False
        self._last = b""

    async def take(self, piece: AnswerHead | bytes) -> None:
        """Pass a piece of the answer on."""
        if isinstance(piece, AnswerHead):
            await self._begin(piece.status, piece.headers)
            await self._write(piece.body, is_last=piece.is_whole)
        else:
            self._last = piece
            await self._write(piece)

    async def end(self) -> None:
        if not self._has_ended:
            await self._write(b"", is_last=True)

    async def fail(self, error: ApiError) -> None:
        """Say an error: as an answer of its own, or as the last event of a stream. Any other answer is cut off."""
        if self._has_ended:
            return
        if not self._has_begun:
            body = error_body(error, self._style)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
            raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await self._begin(error.status, [*raw, (b"x-request-id", self.request_id.encode()), *SAFE_HEADERS])
            await self._write(body, is_last=True)
        elif self._is_stream:
            await self._write(self._error_frames(error), is_last=True)
        else:
            raise ConnectionAbortedError(error.message)

    async def _begin(self, status: int, headers: Headers) -> None:
        self._has_begun = True
        if self.is_named:
            headers = [(name, value) for name, value in headers if name != b"x-request-id"]
        self._is_stream = any(name == b"content-type" and b"event-stream" in value for name, value in headers)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, body: bytes, *, is_last: bool = False) -> None:
        self._has_ended = is_last
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    def _error_frames(self, error: ApiError) -> bytes:
        if self._path == "/v1/responses":
            numbers = _SEQUENCE.findall(self._last)
            event = {"type": "error", "code": "server_error", "message": error.message, "param": None}
            return named_frames([event | {"sequence_number": int(numbers[-1]) + 1 if numbers else 0}])
        if self._style == "anthropic":
            return named_frames([error_object(error, "anthropic")])
        return data_frames([error_object(error, "openai")], is_last=True)


async def _chain(owner: str, body: bytes) -> tuple[bytes, ...]:
    """What a body is routed by. A body that is no JSON, or too deep, has none, and a replica says so to the client."""

    def find() -> tuple[bytes, ...]:
        try:
            return chain_of(owner, orjson.loads(body))
        except (ValueError, TypeError, RecursionError):
            return ()

    return await asyncio.to_thread(find) if len(body) > LARGE else find()


def _data_of(scope: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    found = {name: scope[name] for name in _SCOPE if name in scope}
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name != b"x-request-id"]
    return {**found, "headers": [*headers, (b"x-request-id", request_id.encode())], "root_path": ""}


def _named(headers: Headers) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found


async def _live(receive: Receive, send: Send) -> None:
    async for step in _steps(receive):
        await send({"type": f"lifespan.{step}.complete"})


async def _steps(receive: Receive) -> AsyncIterator[str]:
    for step in ("startup", "shutdown"):
        await receive()
        yield step
