"""What each key's own requests are doing and have done: all that a key without the scope admin sees of the server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from qnext.server.keys import MAX_KEYS

if TYPE_CHECKING:
    from qnext.server.exchange import Exchange
    from qnext.server.generation import Generation

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
    """Of one key: its totals since the server's start, and its requests that have not ended."""

    totals: Totals
    states: list[dict[str, Any]]


class OwnLedger:
    """Totals of the requests that have ended, by key. `active` are those that have not. Belongs to the event loop."""

    def __init__(self, active: Iterable[Exchange]) -> None:
        self._active = active
        self._ended: dict[str, Totals] = {}

    def end(self, exchange: Exchange) -> None:
        if exchange.key is None or not exchange.generations:
            return
        totals = self._ended.pop(exchange.key.id, None) or Totals()
        totals.add(exchange.generations)
        self._ended[exchange.key.id] = totals
        if len(self._ended) > 2 * MAX_KEYS:  # of keys that are long gone
            del self._ended[next(iter(self._ended))]

    def of(self, key_id: str) -> OwnWork:
        own = [exchange for exchange in self._active if exchange.key is not None and exchange.key.id == key_id]
        totals = self._ended.get(key_id, Totals()).copy()
        for exchange in own:
            totals.add(exchange.generations)
        return OwnWork(totals, [_state(exchange) for exchange in own if exchange.generations])


def _state(exchange: Exchange) -> dict[str, Any]:
    totals = Totals()
    totals.add(exchange.generations)
    phases = {generation.phase for generation in exchange.generations}
    return {
        "request_id": exchange.request_id,
        "route": exchange.route.path,
        "phase": next((phase for phase in _PHASES if phase in phases), "done"),
        "prompt_tokens": exchange.outcome.prompt_tokens,
        "cached_tokens": totals.prompt_tokens_cached,
        "output_tokens": totals.output_tokens,
    }


def own_document(work: OwnWork) -> dict[str, Any]:
    """A tick's part that tells what happened, of this key alone."""
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
