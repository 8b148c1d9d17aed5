"""Which waiting request runs next, what it is lent, and who yields to it. No torch."""

from __future__ import annotations

from qnext.engine.request import Request, RequestStatus
from qnext.engine.scheduling.blocks import RefPool
from qnext.engine.scheduling.copies import Copies
from qnext.engine.scheduling.flights import Flight
from qnext.engine.scheduling.loader import Loader
from qnext.engine.scheduling.prefix import Hit, PrefixCache
from qnext.engine.scheduling.shares import Reach, Shares
from qnext.engine.scheduling.turns import Turns
from qnext.engine.step import Limits

_NO_HIT = Hit(0, (), None, None)
_MAX_PASSED = 4  # times the seats: how many others may pass a request that found no room


class Admission:
    """From the queue to a seat. What it is given belongs to the scheduler: `running` in the order of admission."""

    def __init__(
        self,
        limits: Limits,
        blocks: RefPool,
        slots: RefPool,
        prefixes: PrefixCache | None,
        loader: Loader | None,
        turns: Turns,
        shares: Shares,
        running: list[Request],
        copies: Copies,
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._slots = slots
        self._prefixes = prefixes
        self._loader = loader
        self._turns = turns
        self._shares = shares
        self._running = running
        self._copies = copies
        self._blocked: dict[str, tuple[Request, tuple[object, ...]]] = {}  # by owner: who found no room, as things were

    def first(self) -> Request | None:
        """Whose turn it is, where there is a seat and may be room."""
        return self._turns.next(self._may_try) if len(self._running) < self._limits.max_num_seqs else None

    def who_yields(self) -> Request | None:
        """Whom to send back, so that an owner that waits gets what it has less of than its share."""
        victim = self._shares.yields_seat(lambda r: not self.must_wait(r) and not self.must_fetch(r))
        if victim is None and len(self._running) < self._limits.max_num_seqs:
            for other, version in self._blocked.values():
                if version == self._version() and other.status is RequestStatus.WAITING:
                    victim = victim or self._shares.yields_room(other, self._limits.blocks_of(other.num_tokens))
        return victim

    def _version(self) -> tuple[object, ...]:
        """Another one when somebody let go of blocks or slots, or a prompt is on its way that another might wait for.

        Without either, a request that found no room finds none. What is newly cached does not count: where it would
        save a request much, that request waits for it.
        """
        newest = self._running[-1].id if self._running else ""
        return self._blocks.num_releases, self._slots.num_releases, newest

    def must_wait(self, request: Request, flight: Flight | None = None) -> bool:
        """Whether another computes just now what this one needs; asks all, or only the one whose `flight` is given."""
        if self._prefixes is None or request.max_hit_tokens < request.num_tokens - 1:
            return False
        if request.wait is None or not request.wait.is_open:
            tokens = request.token_range(0, request.num_tokens)
            request.wait = self._prefixes.wait(
                tokens, salt=request.salt, limit=len(tokens) - 1, flights=None if flight is None else (flight,)
            )
        return request.wait is not None and request.wait.is_open

    def must_fetch(self, request: Request) -> bool:
        if self._loader is None or (request.was_looked_up and request.fetch is None):
            return False
        tokens = request.token_range(0, request.num_tokens)
        num_running = self._turns.num_running
        return self._loader.must_wait(
            request,
            tokens,
            limit=request.max_hit_tokens,
            may_displace=lambda other: num_running(request.owner) < num_running(other.owner),
        )

    def admit(self, request: Request) -> bool:
        """Lend a slot and the blocks of all known tokens, those of a cached prefix among them."""
        tokens = request.token_range(0, request.num_tokens)
        hit = _NO_HIT
        reach: Reach = "idle" if self._turns.num_running(request.owner) else "all"
        if self._loader is not None:
            spare = len(self._running)
            self._loader.place(
                request,
                tokens,
                has_room=lambda b, s: self._shares.make_room(b and b + spare, s, request.owner, reach=reach),
            )
        if self._prefixes is not None:
            hit = self._prefixes.acquire(tokens, salt=request.salt, limit=request.max_hit_tokens)
            if hit.num_tokens and not self._has_room_for(request, hit, reach):
                # What is to be copied takes room too: without it there may be enough.
                self._prefixes.release(hit)
                hit = _NO_HIT
        if not self._has_room_for(request, hit, reach):
            self._blocked[request.owner] = (request, self._version())
            return False
        self._blocked.pop(request.owner, None)
        self._turns.remove(request)
        self._turns.begin(request)
        self._running.append(request)
        for other, _ in self._blocked.values():
            other.num_passed += 1
        request.status, request.wait, request.fetch = RequestStatus.RUNNING, None, None
        request.blocks = [
            *hit.blocks,
            *self._blocks.allocate(self._limits.blocks_of(len(tokens)) - len(hit.blocks), request.owner),
        ]
        (request.slot,) = self._slots.allocate(1, request.owner)
        request.num_turn_steps = request.num_passed = 0
        request.num_computed_tokens = request.num_reused_tokens = hit.num_tokens
        request.num_admissions += 1
        if self._prefixes is not None:
            interval = self._limits.checkpoint_interval
            stops = range(interval, len(tokens), interval) if interval else ()
            request.flight = self._prefixes.announce(tokens, salt=request.salt, hit=hit, stops=stops)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = hit.num_tokens
            self._copies.begin(hit, request.slot, request.blocks)
        return True

    def _has_room_for(self, request: Request, hit: Hit, reach: Reach) -> bool:
        """A new sequence needs its blocks, and one more for each other that runs, lest it be sent back at once."""
        spare = len(self._running) if self._limits.num_blocks is not None else 0
        num_blocks = self._limits.blocks_of(request.num_tokens) - len(hit.blocks) + spare
        return self._shares.make_room(num_blocks, 1, request.owner, reach=reach)

    def _may_try(self, request: Request) -> bool:
        """Whether there may be room for the first waiting request of an owner. Another owner's that found none is
        passed within one's share, and not for ever."""
        version = self._version()
        found = self._blocked.get(request.owner)
        if found is not None and found == (request, version):
            return False
        for owner, (other, then) in list(self._blocked.items()):
            if other.status is not RequestStatus.WAITING:
                del self._blocked[owner]
            elif owner != request.owner and then == version:
                is_starved = other.num_passed >= _MAX_PASSED * self._limits.max_num_seqs
                if is_starved and not self._turns.num_running(owner):
                    return False
                if not self._shares.is_within(request.owner, self._limits.blocks_of(request.num_tokens)):
                    return False
        return True
