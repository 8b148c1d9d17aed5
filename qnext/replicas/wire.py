"""A request and the pieces of its answer as bytes of a connection between an ingress and a replica. No torch, no Ray.

A connection begins with the replica's token. Then it carries one call after another, each with its answer behind it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, NamedTuple

import orjson

from qnext.replicas.call import AnswerHead, RoutedCall

TOKEN_BYTES = 32
_CALL = struct.Struct("<QIQ")  # number of the call, bytes of its scope and of its body
_PIECE = struct.Struct("<BIQ")  # kind, bytes of a head and of a body
_BODY, _HEAD, _WHOLE, _END, _REFUSED, _FAILED = range(6)
_BYTES_OF_SCOPE = ("raw_path", "query_string")


class Refused(Exception):
    """The replica is about to end and has not begun with the call."""


class ReplicaFailed(Exception):
    """The call broke in the replica, whose log says why."""


class NumberedCall(NamedTuple):
    number: int  # of the call in its replica, chosen at random
    call: RoutedCall


END, REFUSED, FAILED = (_PIECE.pack(kind, 0, 0) for kind in (_END, _REFUSED, _FAILED))


def call_bytes(numbered: NumberedCall) -> bytes:
    """Without what the call was routed by, which is of no use there."""
    scope, body = dict(numbered.call.scope), numbered.call.body
    for name in _BYTES_OF_SCOPE:
        if name in scope:
            scope[name] = scope[name].decode("latin-1")
    scope["headers"] = _texts(scope["headers"])
    head = orjson.dumps(scope)
    return _CALL.pack(numbered.number, len(head), len(body)) + head + body


async def read_call(reader: asyncio.StreamReader) -> NumberedCall:
    """Raises IncompleteReadError at the end of the connection."""
    number, head_bytes, body_bytes = _CALL.unpack(await reader.readexactly(_CALL.size))
    scope: dict[str, Any] = orjson.loads(await reader.readexactly(head_bytes))
    for name in _BYTES_OF_SCOPE:
        if name in scope:
            scope[name] = scope[name].encode("latin-1")
    scope["headers"] = _headers(scope["headers"])
    for name in ("client", "server"):
        if scope.get(name) is not None:
            scope[name] = tuple(scope[name])
    return NumberedCall(number, RoutedCall(scope, await reader.readexactly(body_bytes)))


def piece_bytes(piece: AnswerHead | bytes) -> bytes:
    if isinstance(piece, bytes):
        return _PIECE.pack(_BODY, 0, len(piece)) + piece
    head = orjson.dumps([piece.status, _texts(piece.headers)])
    return _PIECE.pack(_WHOLE if piece.is_whole else _HEAD, len(head), len(piece.body)) + head + piece.body


async def read_piece(reader: asyncio.StreamReader) -> AnswerHead | bytes | None:
    """None at the end of the answer. Raises Refused, ReplicaFailed, IncompleteReadError."""
    kind, head_bytes, body_bytes = _PIECE.unpack(await reader.readexactly(_PIECE.size))
    if kind == _END:
        return None
    if kind == _REFUSED:
        raise Refused
    if kind == _FAILED:
        raise ReplicaFailed
    head = await reader.readexactly(head_bytes)
    body = await reader.readexactly(body_bytes)
    if kind == _BODY:
        return body
    status, headers = orjson.loads(head)
    return AnswerHead(status, _headers(headers), body, kind == _WHOLE)


def _texts(headers: Any) -> list[list[str]]:
    return [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers]


def _headers(texts: list[list[str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in texts]
