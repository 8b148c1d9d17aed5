"""What goes from the ingress to a replica and back: a request and its routing as data, and the pieces of the answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

from qnext.server.http.guard import Headers


class RoutedCall(NamedTuple):
    """A request with its whole body. `chain` is what it is routed by (`prefixes.chain_of`)."""

    scope: dict[str, Any]  # of ASGI, without what belongs to a process
    body: bytes
    chain: tuple[bytes, ...] = ()


class AnswerHead(NamedTuple):
    """The first piece of an answer. `body` is its beginning, or all of it where `is_whole`; bytes follow."""

    status: int
    headers: Headers
    body: bytes
    is_whole: bool


# The pieces of an answer; closing the generator is the client's leaving.
AskReplica = Callable[[RoutedCall], AsyncGenerator[AnswerHead | bytes, None]]
