"""uvicorn's HTTP/1.1 with bounds that it lacks: for slow clients, tiny chunks and requests sent ahead of an answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qnext.server.errors import ApiError, error_body
from qnext.server.http.guard import SAFE_HEADERS
from qnext.server.limits import Limits
from qnext.server.requests import NO_ANSWER, Visit

if TYPE_CHECKING:
    from qnext.server.server import Server

# For the rest of a body that nobody reads, so that its sender sees the answer: without a byte, looked at this often.
_LINGER_SECONDS = 2.0
_LINGER_LOOKS = 4
_MAX_AHEAD = 64 << 10  # bytes of further requests while one is answered
_MAX_PIECES = 1_024  # of a body, where they are smaller than _LEAST_PIECE bytes on average
_LEAST_PIECE = 64
_SEND_BUFFER = 64 << 10  # bytes on their way to a client
_LEAST_WRITTEN = 4 << 10  # bytes that a client must take in `write_seconds`


class _Connection(h11.Connection):
    """Refuses a body of very small chunks, and sends the head of an answer with the first piece of its body.

    A chunk costs a thousand times the work of one byte. Two writes would be two packets, and wake a client twice.
    """

    is_too_long = False  # the head that it could not read
    _num_pieces = _num_bytes = 0
    _head: list[bytes] | None = None

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """The bytes of an event. The head of an answer is held back, and goes before the next event."""
        parts = super().send_with_data_passthrough(event)
        if isinstance(event, h11.Response):
            self._head = parts
            return []
        if self._head is not None and parts is not None:
            parts, self._head = [*self._head, *parts], None
        return parts

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.is_too_long = error.error_status_hint == 431
            raise
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > _MAX_PIECES and self._num_bytes < _LEAST_PIECE * self._num_pieces:
                raise h11.RemoteProtocolError("a body of very small pieces")
        return event


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose client is too slow to send headers or to read an answer.

    Bytes that are no HTTP, and connections above `max_connections`, get an error in the usual form. `book` is told of
    requests that never reached the application.
    """

    limits = Limits()
    conn: _Connection
    book: Callable[[Visit], None]
    _is_booked = False  # what came is no request, or no whole one
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _has_come = False  # something, since it was looked at last

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER, self.limits.max_header_bytes)
        # So that we hear of what waits for its reader. Not 0: asyncio's TLS would take an empty buffer for a full one,
        # and no answer would get past its head.
        transport.set_write_buffer_limits(high=1)
        # The system would take megabytes for a client that reads none of them.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if len(self.connections) > self.limits.max_connections:
            self.app = self.app.refuse_full
        self._header_timer = self.loop.call_later(self.limits.header_seconds, self._close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._book_unfinished("client_disconnected")
        super().connection_lost(exc)

    # ---- what comes ----

    def data_received(self, data: bytes) -> None:
        self._has_come = True
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
        is_first = self.conn.our_state is h11.IDLE  # no request has begun
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = ApiError(400, "this is not HTTP/1.1", code="invalid_request")
        if self.conn.is_too_long:
            error = ApiError(431, "the headers are too large", code="headers_too_large")
        visit = self._visit(error.status, error.code)
        if not is_first and "visit" in self.cycle.scope["state"]:
            visit.request_id = self.cycle.scope["state"]["visit"].request_id
        body = error_body(error, "openai")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close"), (b"x-request-id", visit.request_id.encode()), *SAFE_HEADERS]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
        self._is_booked = True
        if is_first:
            self.book(visit)
        else:  # its body was wrong: whoever has the request books it
            self.cycle.scope["state"]["forced"] = visit
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _visit(self, status: int, code: str | None) -> Visit:
        return Visit(self.client[0] if self.client else "", status=status, error_code=code)

    def _book_unfinished(self, code: str) -> None:
        """Of a request whose head never came whole."""
        if not self._is_booked and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._is_booked = True
            self.book(self._visit(NO_ANSWER, code))

    def _disarm_header(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_late(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self._book_unfinished("client_too_slow")
            self.transport.close()

    # ---- what goes ----

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self._linger(self.cycle, _LINGER_LOOKS, self.loop.time() + self.limits.body_seconds)

    def _linger(self, cycle: object, num_looks: int, end: float) -> None:
        self._has_come = False
        look = (cycle, num_looks, end)
        self._linger_timer = self.loop.call_later(_LINGER_SECONDS / _LINGER_LOOKS, self._close_unread, *look)

    def _close_unread(self, cycle: object, num_looks: int, end: float) -> None:
        # Several looks, and reading between them: a loop that was held up has not heard yet what has come.
        if self.cycle is not cycle or self.conn.their_state is not h11.SEND_BODY:
            return
        num_looks = _LINGER_LOOKS if self._has_come else num_looks - 1
        if num_looks and self.loop.time() < end:
            self._linger(cycle, num_looks, end)
        else:
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
            if not self.cycle.response_complete and "visit" in self.cycle.scope["state"]:
                self.cycle.scope["state"]["visit"].error_code = "client_too_slow"
            self.transport.abort()
        else:
            self._await_reader()


def protocol_of(server: Server) -> type[PatientProtocol]:
    """The protocol with a server's limits, as uvicorn takes it."""
    return type("Protocol", (PatientProtocol,), {"limits": server.limits, "book": staticmethod(server.book_visit)})
