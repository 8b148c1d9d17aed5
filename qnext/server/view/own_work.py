"""What each key's own requests do and have done. A key without the scope admin sees nothing else of the server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from qnext.server.access.keys import MAX_KEYS

if TYPE_CHECKING:
    from qnext.server.inference.generation import Generation
    from qnext.server.requests import HttpRequest

_PHASES = ("answer", "prompt", "queue")
_MAX_LISTED = 32  # requests of one tick


@dataclass
class Totals:
    """Tokens of a key's requests."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, generations: Iterable[Generation]) -> None:
        for request in (request for generation in generations for request in generation.requests):
            if request.num_cached_tokens is not None:  # it has begun
                self.prompt_tokens_cached += request.num_cached_tokens
                self.prompt_tokens_computed += len(request.prompt_ids) - request.num_cached_tokens
            self.output_tokens += len(request.output_ids)
            self.drafted_tokens += request.num_drafted
            self.accepted_tokens += request.num_accepted

    def copy(self) -> Totals:
        return Totals(*(getattr(self, field.name) for field in fields(self)))


class OwnWork(NamedTuple):
    """The work of one key: its totals since the server's start, and its requests that have not ended."""

    totals: Totals
    states: list[dict[str, Any]]


class OwnLedger:
    """Totals of the ended requests, by key. `active` are the requests that have not ended. Belongs to the event
    loop."""

    def __init__(self, active: Iterable[HttpRequest]) -> None:
        self._active = active
        self._ended: dict[str, Totals] = {}

    def end(self, request: HttpRequest) -> None:
        if request.key is None or not request.generations:
            return
        totals = self._ended.pop(request.key.id, None) or Totals()
        totals.add(request.generations)
        self._ended[request.key.id] = totals
        if len(self._ended) > 2 * MAX_KEYS:  # of keys that are long gone
            del self._ended[next(iter(self._ended))]

    def of(self, key_id: str) -> OwnWork:
        own = [request for request in self._active if request.key is not None and request.key.id == key_id]
        totals = self._ended.get(key_id, Totals()).copy()
        for request in own:
            totals.add(request.generations)
        return OwnWork(totals, [_state(request) for request in own if request.generations])


def _state(request: HttpRequest) -> dict[str, Any]:
    totals = Totals()
    totals.add(request.generations)
    phases = {generation.phase for generation in request.generations}
    return {
        "request_id": request.request_id,
        "route": request.route.path,
        "phase": next((phase for phase in _PHASES if phase in phases), "done"),
        "prompt_tokens": request.outcome.prompt_tokens,
        "cached_tokens": totals.prompt_tokens_cached,
        "output_tokens": totals.output_tokens,
    }


def own_document(work: OwnWork) -> dict[str, Any]:
    """The part of a tick that says what happened, for this key alone."""
    totals, phases = work.totals, [state["phase"] for state in work.states]
    return {
        "requests": {"running": len(phases) - phases.count("queue"), "waiting": phases.count("queue")},
        "prefix": {
            "prompt_tokens_cached": totals.prompt_tokens_cached,
            "prompt_tokens_computed": totals.prompt_tokens_computed,
        },
        "drafts": {"drafted": totals.drafted_tokens, "accepted": totals.accepted_tokens},
        "output_tokens": totals.output_tokens,
        "states": work.states[:_MAX_LISTED],
    }
