"""What each owner may hold of blocks and slots, and whose request yields when another owner has less. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Literal

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.prefix import PrefixCache
from qnext.engine.policy.sequence import Sequence
from qnext.engine.policy.turns import Turns

IDLE_SECONDS = 300.0  # after its last request an owner's cached prefixes yield to what others run
QUANTUM = 4  # steps that bring a request further than it ever was, before it may be sent back for another owner's

Reach = Literal["share", "idle", "all"]


class Shares:
    """Room for one owner at the cost of others, as far as they have more than their shares.

    `running` is the scheduler's list, in the order of admission. `clock` gives seconds that never run back.
    """

    def __init__(
        self,
        blocks: RefPool,
        slots: RefPool,
        prefixes: PrefixCache | None,
        turns: Turns,
        running: list[Sequence],
        clock: Callable[[], float],
    ) -> None:
        self._blocks = blocks
        self._slots = slots
        self._prefixes = prefixes
        self._turns = turns
        self._running = running
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()  # owners by the time of their last request

    def note(self, owner: str) -> None:
        """It has asked for something, or something of it has ended."""
        self._seen[owner] = self._clock()
        self._seen.move_to_end(owner)

    def make_room(self, num_blocks: int, num_slots: int, owner: str, *, reach: Reach) -> bool:
        """Whether so much is free, after evicting from the cache where that helps.

        With "share" the prefixes of others stay that lie within their shares; "idle" takes those of owners that have
        asked for nothing for long, "all" takes any.
        """
        blocks, slots = num_blocks - self._blocks.num_free, num_slots - self._slots.num_free
        if blocks <= 0 and slots <= 0:
            return True
        if self._prefixes is not None:
            exposed = {"share": (), "idle": self._idle_owners() if reach == "idle" else (), "all": None}[reach]
            with self._claim(owner, num_blocks, num_slots):
                self._prefixes.evict(num_blocks=max(0, blocks), num_slots=max(0, slots), owner=owner, exposed=exposed)
        return num_blocks <= self._blocks.num_free and num_slots <= self._slots.num_free

    def is_within(self, owner: str, num_blocks: int) -> bool:
        """Whether an owner stays within its share of the blocks with so many more."""
        with self._claim(owner, num_blocks, 0):
            return not self._blocks.holdings.excess(owner)

    def yields_blocks(self, sequence: Sequence, planned: Collection[Sequence]) -> Sequence:
        """Who goes back to the queue so that `sequence` can grow: of those that have no place in this step the newest
        of the owner that holds most, if that is more than its share; else the newest."""
        candidates = [r for r in reversed(self._running) if r not in planned]
        holdings = self._blocks.holdings
        largest = max({r.owner: None for r in candidates}, key=holdings.excess)
        if holdings.excess(largest):
            return next(r for r in candidates if r.owner == largest)
        return candidates[0]

    def yields_seat(self, is_ready: Callable[[Sequence], bool]) -> Sequence | None:
        """Who goes back so that a waiting request can run whose owner would still have no more seats than the other."""
        num_running, seats = self._turns.num_running, self._turns.seats
        if len(self._running) < seats.size:
            return None
        with closing(seats.largest_first(lambda owner: self._newest(owner) is not None)) as owners:
            largest = next(owners, None)
        if largest is None:
            return None
        most = num_running(largest) - 2
        if self._turns.next(lambda sequence: num_running(sequence.owner) <= most and is_ready(sequence)) is None:
            return None
        return self._newest(largest)

    def yields_room(self, sequence: Sequence, num_blocks: int) -> Sequence | None:
        """Who goes back so that a request finds blocks: nobody, where its owner would hold too much and has others
        running."""
        owner, holdings = sequence.owner, self._blocks.holdings
        with self._claim(owner, num_blocks, 0):
            if holdings.excess(owner) and self._turns.num_running(owner):
                return None
            with closing(
                holdings.largest_first(lambda o: o != owner and holdings.excess(o) > 0 and bool(self._newest(o)))
            ) as owners:
                largest = next(owners, None)
        return None if largest is None else self._newest(largest)

    def _newest(self, owner: str) -> Sequence | None:
        """Its newest request that has begun nothing yet, or has come far enough not to be sent back in vain."""
        own = (r for r in reversed(self._running) if r.owner == owner)
        return next((r for r in own if r.num_turn_steps == 0 or r.num_turn_steps >= QUANTUM), None)

    def _idle_owners(self) -> list[str]:
        """Longest idle first."""
        found, now = [], self._clock()
        for owner, seen in list(self._seen.items()):
            if seen + IDLE_SECONDS > now:
                break
            if self._turns.has_work(owner):
                continue
            if owner in self._blocks.holdings.held or owner in self._slots.holdings.held:
                found.append(owner)
            else:
                del self._seen[owner]
        return found

    @contextmanager
    def _claim(self, owner: str, num_blocks: int, num_slots: int) -> Iterator[None]:
        """Count as held what an owner is about to get."""
        with ExitStack() as undo:
            for pool, count in ((self._blocks, num_blocks), (self._slots, num_slots)):
                pool.holdings.add(owner, count)
                undo.callback(pool.holdings.add, owner, -count)
            yield
