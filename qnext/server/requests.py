"""A request as data: who sent it, what it asks, and how it ended. No torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from qnext.server.access.keys import Key
from qnext.server.access.rates import network_of
from qnext.server.inference.generation import Generation
from qnext.server.lanes import Asker
from qnext.server.moderation.judgement import Action, TextJudgement
from qnext.server.routes import Route

AsgiMessage = MutableMapping[str, Any]
JUDGED: Mapping[Action, str] = {"allow": "allowed", "flag": "flagged", "redact": "redacted", "block": "blocked"}
STRICTNESS = ("allowed", "flagged", "redacted", "unjudged", "failed", "blocked")  # as the audit log says it
NO_ANSWER = 499  # what logs and metrics have where a connection ended without an answer


def new_request_id() -> str:
    return f"req-{secrets.token_hex(12)}"


@dataclass(eq=False)
class Visit:
    """One request of a listener, from its first line on. `method` is None where it could not be read.

    `is_booked`: a route has counted the request and written its line in the audit log.
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
        """Copy id, status and error to the record of the same request, because these were sent to the client."""
        other.request_id, other.status, other.error_code = self.request_id, self.status, self.error_code


@dataclass(eq=False)
class RequestOutcome:
    """What the audit log says of a request beside its sender and its time. It has no content."""

    model: str | None = None
    params_hash: str | None = None
    system_fingerprint: str | None = None
    trace: dict[str, Any] | None = None  # what its answers came from
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    abort_phase: str | None = None
    error_code: str | None = None
    stream: bool = False
    status: int = 0
    moderation: str | None = None  # the strictest that was said of its texts
    categories: tuple[str, ...] = ()  # the reasons, in the words of the hook
    flagged: bool = False  # people should look at it

    def note_judgement(self, judgement: TextJudgement | None) -> None:
        """None: the text passed unjudged."""
        word = "unjudged" if judgement is None else JUDGED[judgement.action]
        if self.moderation is None or STRICTNESS.index(word) > STRICTNESS.index(self.moderation):
            self.moderation = word
        if judgement is not None:
            self.flagged |= judgement.needs_review
            self.categories = tuple(dict.fromkeys((*self.categories, *judgement.categories)))


@dataclass(eq=False)
class HttpRequest:
    """A request that a route answers. `key` is None on a server without keys, and on public routes."""

    route: Route
    request_id: str
    headers: Mapping[str, str]  # lower case; of several with one name the first
    path_params: Mapping[str, str]
    client: str
    key: Key | None = None
    claimed: Key | None = None  # an expired or revoked one that it came with
    body: Any = None
    outcome: RequestOutcome = field(default_factory=RequestOutcome)
    reply_headers: dict[str, str] = field(default_factory=dict)
    generations: list[Generation] = field(default_factory=list)  # that it has begun
    is_replying: bool = False
    write_began: float | None = None  # on the event loop's clock, while a write waits for the client
    is_parked: bool = False  # its generations rest until that write is over
    num_held: int = 0  # bytes of its body, as far as it is read
    is_small: bool = True  # whether nothing takes long that is done once for each part of the body

    @property
    def owner(self) -> str:
        """The owner whose share of queue and rates the request takes."""
        return "" if self.key is None else self.key.id

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer that the request's key may use; None where this is not bounded."""
        return None if self.key is None else self.key.max_context

    @property
    def payer(self) -> str:
        """The owner whose turn the work of this request takes: the key, or the address where there are no keys."""
        return f"key {self.key.id}" if self.key is not None else network_of(self.client)

    @property
    def asker(self) -> Asker:
        return Asker(self.payer, self.num_held)

    def rest(self, *, is_parked: bool) -> None:
        """Park its generations while the client does not read, or continue them."""
        if is_parked != self.is_parked:
            self.is_parked = is_parked
            for generation in self.generations:
                generation.rest(is_parked=is_parked)
