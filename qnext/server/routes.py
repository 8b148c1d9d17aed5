"""The declaration of a route, and what a handler returns. No torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from qnext.server.errors import ErrorStyle
from qnext.server.long_json import json_parts

# Who may call: everybody; whoever has a key; a key with that scope.
Scope = Literal["public", "any", "inference", "tokenize", "metrics", "admin"]
# What bounds it: queue, rates and deadlines of generation; rates and turns of work that grows with a body; a small
# bounded amount of work; answers from memory. Whatever reads a body is of the first two.
LimitClass = Literal["generation", "work", "light", "probe", "static"]
# What the audit log says: a line with token counts; a line; a line where it is refused.
AuditClass = Literal["request", "access", "refusals"]


@dataclass(frozen=True)
class HttpResponse:
    """A whole answer. `parts`, if given, are the body in place of `body`. Each part is made when it is sent."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    parts: Iterator[bytes] | None = None

    @classmethod
    def of(cls, value: Any, **more: Any) -> HttpResponse:
        """An answer with the JSON of a value."""
        found = json_parts(value)
        return cls(found, **more) if isinstance(found, bytes) else cls(b"", parts=found, **more)


@dataclass(frozen=True)
class EventStream:
    """Server-sent events; each piece holds whole frames. Closing the generator ends what it waits for."""

    frames: AsyncGenerator[bytes, None]
    headers: Mapping[str, str] = field(default_factory=dict)


# Its argument is an Exchange. That type knows Route, so it cannot be named here.
Handler = Callable[[Any], Awaitable["HttpResponse | EventStream"]]


@dataclass(frozen=True)
class Route:
    """One path and method with everything that the server must know of it. No default opens access.

    `body` is the model of a JSON body, None where there is none. `answer` is a JSON schema of the answer, for the
    OpenAPI document.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    scope: Scope
    limit: LimitClass
    errors: ErrorStyle
    audit: AuditClass
    summary: str
    body: type[BaseModel] | None = None
    answer: Mapping[str, Any] | None = None
    streams: bool = False
    content_type: str | None = None  # of an answer that is not JSON
