"""How far the computation of one request has come, and what it holds. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from qnext.engine.policy.archive import Fetch
from qnext.engine.policy.flights import Flight, Wait
from qnext.engine.policy.request import Request


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"  # neither waits nor runs until it is resumed
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one request as the scheduler sees them, which alone writes here.

    `num_computed_tokens` counts the tokens whose keys, values and state are in the cache.
    """

    request: Request
    status: Status = Status.WAITING
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    num_computed_tokens: int = 0
    num_planned_blocks: int = 0  # of `blocks`, that a plan has named: the cache's table has them
    num_admissions: int = 0
    num_reused_tokens: int = 0  # whose states and keys were there when it was admitted last
    num_turn_steps: int = 0  # since it was admitted last, that brought it further than it ever was
    num_furthest_tokens: int = 0  # the most that were ever computed
    num_passed: int = 0  # others that were admitted since it found no room
    flight: Flight | None = None  # its prompt on the way to the cache
    wait: Wait | None = None  # for whom it waits
    fetch: Fetch | None = None  # its prefix, on the way from the host or the disk
    was_looked_up: bool = False  # there, since it was queued

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def owner(self) -> str:
        return self.request.owner

    @property
    def salt(self) -> str:
        return self.request.salt

    @property
    def num_tokens(self) -> int:
        return self.request.num_tokens

    @property
    def num_unread(self) -> int:
        """Tokens that are still to be computed; 1 where only the last is, which chooses the next."""
        return self.request.num_tokens - self.num_computed_tokens

    @property
    def max_cached_tokens(self) -> int:
        return self.request.max_cached_tokens

    @property
    def max_hit_tokens(self) -> int:
        """The most tokens that need not be computed again: the last must be, and those whose logits are asked for."""
        request = self.request
        if request.params.prompt_logprobs is None:
            return request.num_tokens - 1
        return min(request.num_tokens - 1, max(0, len(request.prompt_sampled) - 1))

    def token_range(self, start: int, end: int) -> tuple[int, ...]:
        return self.request.token_range(start, end)
