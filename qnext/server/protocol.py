"""The HTTP/1.1 of uvicorn with what it leaves open: bounds on slow clients, tiny chunks and requests sent ahead."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qnext.server.errors import ApiError, error_body
from qnext.server.limits import Limits

_LINGER_SECONDS = 2.0  # for the rest of a body that nobody reads, so that its sender sees the answer
_MAX_AHEAD = 64 << 10  # bytes of further requests while one is answered
_MAX_PIECES = 1_024  # of a body, where they are smaller than _LEAST_PIECE bytes on average
_LEAST_PIECE = 64
_LEAST_WRITTEN = 4 << 10  # bytes that a client must take in `write_seconds`


class _Connection(h11.Connection):
    """Refuses a body in crumbs: each would cost a thousand times the work of its byte.

    The head of an answer waits for the first piece of its body: two writes are two packets, and wake a client twice.
    """

    _num_pieces = _num_bytes = 0
    _head: list[bytes] | None = None

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """What is to be sent for an event; nothing for an answer's head, which goes before what is next."""
        parts = super().send_with_data_passthrough(event)
        if isinstance(event, h11.Response):
            self._head = parts
            return []
        if self._head is not None and parts is not None:
            parts, self._head = [*self._head, *parts], None
        return parts

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > _MAX_PIECES and self._num_bytes < _LEAST_PIECE * self._num_pieces:
                raise h11.RemoteProtocolError("a body of very small pieces")
        return event


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that ends connections whose client is too slow: to send headers, or to read an answer.

    What is not HTTP gets an answer in the form of all errors; so does a connection above `max_connections`.
    """

    limits = Limits()
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER, self.limits.max_header_bytes)
        # So that we hear of what waits for its reader. Not 0: asyncio's TLS would take an empty buffer for a full one,
        # and no answer would get past its head.
        transport.set_write_buffer_limits(high=1)
        if len(self.connections) > self.limits.max_connections:
            self.app = _full
        self._header_timer = self.loop.call_later(self.limits.header_seconds, self._close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # ---- what comes ----

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm_header()
        elif self._header_timer is None and self.conn.trailing_data[0]:
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._close_late)
        if self.flow.read_paused and self.conn.their_state is h11.DONE:
            # A request sent ahead. Read on, or nobody would hear that the client has gone.
            if len(self.conn.trailing_data[0]) > _MAX_AHEAD:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = error_body(ApiError.bad("this is not HTTP/1.1", code="invalid_request"), "openai")
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _disarm_header(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_late(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self.transport.close()

    # ---- what goes ----

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self._linger_timer = self.loop.call_later(_LINGER_SECONDS, self._close_unread, self.cycle)

    def _close_unread(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_reader(self) -> None:
        # A moment more than whoever writes waits: what it then says of the request stands in the audit log.
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.limits.write_seconds + 1.0, self._check_reader, left)

    def _check_reader(self, left: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() > left - _LEAST_WRITTEN:
            self.transport.abort()
        else:
            self._await_reader()


def protocol_of(limits: Limits) -> type[PatientProtocol]:
    """The protocol with these limits, as uvicorn takes it."""
    return type("Protocol", (PatientProtocol,), {"limits": limits})


async def _full(scope: Any, receive: Any, send: Any) -> None:
    error = ApiError.busy("too many connections", retry_after=5.0)
    body = error_body(error, "openai")
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= {name.lower(): value for name, value in error.headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
