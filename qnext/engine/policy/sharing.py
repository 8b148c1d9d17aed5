"""What requests share of what they computed: prefixes that are cached, on their way, or kept elsewhere. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from qnext.engine.policy.archive import Archive, Load
from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.copies import Copies, Pairs
from qnext.engine.policy.flights import Flight
from qnext.engine.policy.loader import Loader
from qnext.engine.policy.prefix import Hit, PrefixCache
from qnext.engine.policy.prefix_node import Spill, Tokens
from qnext.engine.policy.sequence import Sequence
from qnext.engine.policy.shares import Shares
from qnext.engine.policy.step import StepPlan

NO_HIT = Hit(0, (), None, None)


class SharedWork(NamedTuple):
    """What a step does for prefixes beside its tokens."""

    block_copies: Pairs = ()
    slot_copies: Pairs = ()
    loads: tuple[Load, ...] = ()


class NoSharing:
    """Each request computes all that it needs."""

    prefixes: None = None
    is_archived = False
    has_work = False
    has_spills = False

    def must_wait(self, sequence: Sequence, flight: Flight | None = None) -> bool:
        return False

    def must_fetch(self, sequence: Sequence, *, may_displace: Callable[[Sequence], bool]) -> bool:
        return False

    def find(self, sequence: Sequence, tokens: Tokens, *, has_room: Callable[[int, int], bool]) -> Hit:
        return NO_HIT

    def release(self, hit: Hit) -> None: ...

    def begin(self, sequence: Sequence, tokens: Tokens, hit: Hit) -> None: ...

    def keep(self, sequence: Sequence) -> None: ...

    def let_go(self, sequence: Sequence, *, is_cached: bool) -> None: ...

    def drain(self) -> SharedWork:
        return SharedWork()

    def wait_a_moment(self) -> bool:
        return False

    def end_step(self) -> None: ...

    def forget_copies(self, plan: StepPlan) -> None: ...

    def forget_loads(self, plan: StepPlan) -> None: ...

    def drain_spills(self) -> list[Spill]:
        return []

    def everything(self) -> list[Spill]:
        return []

    def held_bytes(self, owner: str) -> tuple[int, int]:
        return 0, 0

    def held_blocks(self) -> Iterator[int]:
        return iter(())

    def held_slots(self) -> Iterator[int]:
        return iter(())

    def check_integrity(self) -> None: ...


class Sharing:
    """The prefixes of one scheduler, which are cached, copied, waited for, loaded and spilled.

    `archive` has those beyond the device's memory; where it saves at once, what is cached is noted for it too, and not
    only what is evicted. The state of a long prompt is kept every `checkpoint_interval` tokens, unless that is 0.
    """

    def __init__(
        self,
        prefixes: PrefixCache,
        slots: RefPool,
        shares: Shares,
        archive: Archive | None,
        *,
        checkpoint_interval: int,
    ) -> None:
        self.prefixes = prefixes
        self._slots = slots
        self._shares = shares
        self._archive = archive
        self._checkpoint_interval = checkpoint_interval
        self._spills_at_once = archive is not None and archive.saves_at_once
        self._copies = Copies(slots, prefixes)
        self._loader = Loader(archive, prefixes) if archive is not None else None

    # ---- a request that waits ----

    def must_wait(self, sequence: Sequence, flight: Flight | None = None) -> bool:
        """Whether another computes just now what this one needs; asks all, or only the one whose `flight` is given."""
        if sequence.max_hit_tokens < sequence.num_tokens - 1:
            return False
        if sequence.wait is None or not sequence.wait.is_open:
            tokens = sequence.token_range(0, sequence.num_tokens)
            flights = None if flight is None else (flight,)
            sequence.wait = self.prefixes.wait(tokens, salt=sequence.salt, limit=len(tokens) - 1, flights=flights)
        return sequence.wait is not None and sequence.wait.is_open

    def must_fetch(self, sequence: Sequence, *, may_displace: Callable[[Sequence], bool]) -> bool:
        """Whether a longer prefix than the cache has is on its way from the archive."""
        if self._loader is None or (sequence.was_looked_up and sequence.fetch is None):
            return False
        tokens = sequence.token_range(0, sequence.num_tokens)
        return self._loader.must_wait(sequence, tokens, limit=sequence.max_hit_tokens, may_displace=may_displace)

    # ---- a request that is admitted ----

    def find(self, sequence: Sequence, tokens: Tokens, *, has_room: Callable[[int, int], bool]) -> Hit:
        """The longest prefix that it can go on from, which it holds from now on; what has come for it among them, where
        `has_room` for so many blocks and slots."""
        if self._loader is not None:
            self._loader.place(sequence, tokens, has_room=has_room)
        return self.prefixes.acquire(tokens, salt=sequence.salt, limit=sequence.max_hit_tokens)

    def release(self, hit: Hit) -> None:
        """It does not go on from there after all."""
        self.prefixes.release(hit)

    def begin(self, sequence: Sequence, tokens: Tokens, hit: Hit) -> None:
        """It has a slot and blocks of its own and goes on from `hit`."""
        interval = self._checkpoint_interval
        stops = range(interval, len(tokens), interval) if interval else ()
        sequence.flight = self.prefixes.announce(tokens, salt=sequence.salt, hit=hit, stops=stops)
        if sequence.request.num_cached_tokens is None:
            sequence.request.num_cached_tokens = hit.num_tokens
        assert sequence.slot is not None
        self._copies.begin(hit, sequence.slot, sequence.blocks)

    # ---- a request that runs ----

    def keep(self, sequence: Sequence) -> None:
        """After a step: cache what the prompt has come to, where others may go on from."""
        flight = sequence.flight
        if flight is None or sequence.slot is None:
            return
        flight.num_computed = min(sequence.num_computed_tokens, len(flight.tokens))
        if self.prefixes.slots is None:
            self.prefixes.insert(
                flight.tokens, sequence.blocks, salt=sequence.salt, owner=sequence.owner, flight=flight
            )
        elif flight.is_at_stop and self._shares.make_room(0, 1, sequence.owner, reach="share"):
            (slot,) = self._slots.allocate(1, sequence.owner)
            self._copies.keep(sequence.slot, slot)
            self._spill_at_once(sequence, flight.tokens[: flight.num_computed])
            self.prefixes.add_checkpoint(
                flight.tokens,
                sequence.blocks,
                salt=sequence.salt,
                owner=sequence.owner,
                slot=slot,
                is_shared=flight.stops[flight.num_computed],
                flight=flight,
            )
        if sequence.num_computed_tokens >= len(flight.tokens):
            self._land(sequence)

    def let_go(self, sequence: Sequence, *, is_cached: bool) -> None:
        """It leaves its seat. All that it has computed may be shared, if `is_cached`: its slot too, without a copy."""
        if is_cached and sequence.slot is not None:
            tokens = sequence.token_range(0, sequence.num_computed_tokens)
            self._spill_at_once(sequence, tokens)
            if self.prefixes.slots is None:
                self.prefixes.insert(tokens, sequence.blocks, salt=sequence.salt, owner=sequence.owner)
            elif len(tokens) >= self.prefixes.min_tokens:
                self.prefixes.add_checkpoint(
                    tokens, sequence.blocks, salt=sequence.salt, owner=sequence.owner, slot=sequence.slot
                )
        self._land(sequence)

    def _land(self, sequence: Sequence) -> None:
        if sequence.flight is not None:
            self.prefixes.land(sequence.flight)
            sequence.flight = None

    def _spill_at_once(self, sequence: Sequence, tokens: Tokens) -> None:
        if self._spills_at_once:
            assert sequence.slot is not None
            self.prefixes.note_spill(
                tokens, sequence.blocks, salt=sequence.salt, owner=sequence.owner, slot=sequence.slot
            )

    # ---- a step ----

    @property
    def has_work(self) -> bool:
        """Whether there is something to do even if nothing is computed."""
        return bool(self._copies.of_slots) or (self._loader is not None and self._loader.has_loads)

    def drain(self) -> SharedWork:
        """For the plan. What the copies read and the loads write is held until `end_step`."""
        return SharedWork(*self._copies.drain(), self._loader.drain_loads() if self._loader is not None else ())

    def wait_a_moment(self) -> bool:
        """For an engine that can do nothing else. False where nothing is on its way."""
        return self._loader is not None and self._loader.wait_a_moment()

    def end_step(self) -> None:
        """The step is over: its copies and loads were made."""
        self._copies.release()
        if self._loader is not None:
            self._loader.release()

    def forget_copies(self, plan: StepPlan) -> None:
        """The step failed. These states may not have been copied; all other copies were for requests of the step."""
        self.prefixes.forget(target for _, target in plan.slot_copies)

    def forget_loads(self, plan: StepPlan) -> None:
        """Nor may what was to be loaded have come. When nobody holds its blocks any more they go with it."""
        if not plan.loads:
            return
        self.prefixes.forget(load.slot for load in plan.loads if load.slot is not None)
        if any(load.slot is None for load in plan.loads):
            self.prefixes.clear()  # no checkpoint says which blocks these are

    # ---- elsewhere ----

    @property
    def is_archived(self) -> bool:
        """Whether prefixes are kept elsewhere."""
        return self._archive is not None

    @property
    def has_spills(self) -> bool:
        return self.prefixes.has_spills

    def drain_spills(self) -> list[Spill]:
        """What is to be kept elsewhere since the last call. To be read before the next step writes anything."""
        return self.prefixes.drain_spills()

    def everything(self) -> list[Spill]:
        """All that is cached and worth keeping elsewhere, what is worth most last."""
        return self.prefixes.everything()

    def held_bytes(self, owner: str) -> tuple[int, int]:
        """Of one owner, in the host's memory and on disk. Any thread may ask."""
        return (0, 0) if self._archive is None else self._archive.held_bytes(owner)

    # ---- for the integrity check ----

    def held_blocks(self) -> Iterator[int]:
        yield from self.prefixes.owned_blocks()
        yield from self._copies.held_blocks()
        yield from self._loader.held_blocks if self._loader is not None else ()

    def held_slots(self) -> Iterator[int]:
        yield from self.prefixes.owned_slots()
        yield from self._copies.held_slots()
        yield from self._loader.held_slots if self._loader is not None else ()

    def check_integrity(self) -> None:
        self.prefixes.check_integrity()


AnySharing: TypeAlias = Sharing | NoSharing
