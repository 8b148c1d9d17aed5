"""Flights: prompts that are being computed, and the places where their states are wanted. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from qnext.engine.policy.prefix_node import Node, Tokens


@dataclass(eq=False)
class Flight:
    """The prompt of one running request, from its admission until its last token is computed.

    `stops` are the token counts at which a step should end so that the state can be kept; the value says whether
    another request is known to go on from there. Before each step the scheduler writes to `num_planned` how many
    tokens will be computed after it, and after the step to `num_computed`.
    """

    tokens: Tokens
    salt: str
    num_computed: int
    num_planned: int
    stops: dict[int, bool] = field(default_factory=dict)
    is_over: bool = False
    node: Node | None = None  # the last one that was cached of these tokens; the cache's

    @property
    def next_stop(self) -> int | None:
        """The nearest stop behind what is planned: the next step should not go beyond it."""
        return min((stop for stop in self.stops if stop > self.num_planned), default=None)

    @property
    def is_at_stop(self) -> bool:
        """Whether the step that is planned, or was committed last, ends where the state is wanted."""
        return self.num_planned in self.stops

    def may_lead(self, tokens: Tokens, salt: str) -> bool:
        """Whether these tokens are the same up to the first one that is still to be computed, asked there alone."""
        place = slice(self.num_computed, self.num_computed + 1)
        return salt == self.salt and self.tokens[place] == tokens[place] != ()

    def can_stop_at(self, num_tokens: int) -> bool:
        """Whether the state after `num_tokens` can still be caught."""
        return num_tokens > self.num_planned or (num_tokens > self.num_computed and num_tokens in self.stops)


class Wait(NamedTuple):
    """Another request will have computed `num_tokens` shared tokens soon; wait while this is open, then look up."""

    flight: Flight
    num_tokens: int

    @property
    def is_open(self) -> bool:
        return not self.flight.is_over and self.flight.num_computed < self.num_tokens
