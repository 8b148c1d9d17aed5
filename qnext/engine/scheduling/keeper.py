"""What of a request becomes a cached prefix, while its prompt is read and when it leaves its seat. No torch."""

from __future__ import annotations

from qnext.engine.request import Request
from qnext.engine.scheduling.blocks import RefPool
from qnext.engine.scheduling.copies import Copies
from qnext.engine.scheduling.prefix import PrefixCache
from qnext.engine.scheduling.shares import Shares


class Keeper:
    """With `spills_at_once`, what is cached is noted for the tiers too, not only what is evicted."""

    def __init__(
        self, slots: RefPool, prefixes: PrefixCache, shares: Shares, copies: Copies, *, spills_at_once: bool
    ) -> None:
        self._slots = slots
        self._prefixes = prefixes
        self._shares = shares
        self._copies = copies
        self._spills_at_once = spills_at_once

    def keep(self, request: Request) -> None:
        """After a step: cache what the prompt has come to, where others may go on from."""
        flight = request.flight
        if flight is None or request.slot is None:
            return
        flight.num_computed = min(request.num_computed_tokens, len(flight.tokens))
        if self._prefixes.slots is None:
            self._prefixes.insert(flight.tokens, request.blocks, salt=request.salt, owner=request.owner, flight=flight)
        elif flight.is_at_stop and self._shares.make_room(0, 1, request.owner, reach="share"):
            (slot,) = self._slots.allocate(1, request.owner)
            self._copies.keep(request.slot, slot)
            if self._spills_at_once:
                tokens = flight.tokens[: flight.num_computed]
                self._prefixes.note_spill(
                    tokens, request.blocks, salt=request.salt, owner=request.owner, slot=request.slot
                )
            is_shared = flight.stops[flight.num_computed]
            self._prefixes.add_checkpoint(
                flight.tokens,
                request.blocks,
                salt=request.salt,
                owner=request.owner,
                slot=slot,
                is_shared=is_shared,
                flight=flight,
            )
        if request.num_computed_tokens >= len(flight.tokens):
            self.land(request)

    def keep_all(self, request: Request) -> None:
        """Share all that a request has computed, its slot too: no copy, for it is about to let go of that."""
        if request.slot is None:
            return
        tokens = request.token_range(0, request.num_computed_tokens)
        if self._spills_at_once:
            self._prefixes.note_spill(tokens, request.blocks, salt=request.salt, owner=request.owner, slot=request.slot)
        if self._prefixes.slots is None:
            self._prefixes.insert(tokens, request.blocks, salt=request.salt, owner=request.owner)
        elif len(tokens) >= self._prefixes.min_tokens:
            self._prefixes.add_checkpoint(
                tokens, request.blocks, salt=request.salt, owner=request.owner, slot=request.slot
            )

    def land(self, request: Request) -> None:
        if request.flight is not None:
            self._prefixes.land(request.flight)
            request.flight = None
