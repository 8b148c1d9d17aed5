"""A request before any route has it, and what became of it where none did. No torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

NO_ANSWER = 499  # what logs and metrics have where a connection ended without an answer


def new_request_id() -> str:
    return f"req-{secrets.token_hex(12)}"


@dataclass(eq=False)
class Visit:
    """One request of a listener, from its first line on; `method` None where that could not be read.

    `is_booked`: a route has counted it and written its line.
    """

    client: str
    method: str | None = None
    headers: Iterable[tuple[bytes, bytes]] = ()
    request_id: str = field(default_factory=new_request_id)
    route: str | None = None  # the pattern of the closest route
    status: int = 0
    error_code: str | None = None
    is_booked: bool = False
    began: float = field(default_factory=time.perf_counter)

    def overrule(self, other: Visit) -> None:
        """The same request in the books of another: this is what was answered."""
        other.request_id, other.status, other.error_code = self.request_id, self.status, self.error_code
