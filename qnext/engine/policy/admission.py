"""Which waiting request runs next, what it is lent, and who yields to it. No torch."""

from __future__ import annotations

from qnext.engine.policy.prefix import Hit
from qnext.engine.policy.resources import Resources
from qnext.engine.policy.sequence import Sequence, Status
from qnext.engine.policy.shares import Reach
from qnext.engine.policy.sharing import NO_HIT

_MAX_PASSED = 4  # times the seats: how many others may pass a request that found no room


class Admission:
    """From the queue to a seat."""

    def __init__(self, resources: Resources) -> None:
        self._limits, self._blocks, self._slots, self._turns, self._running, self._shares, self._sharing = resources
        # by owner: who found no room, as things were
        self._blocked: dict[str, tuple[Sequence, tuple[object, ...]]] = {}

    def first(self) -> Sequence | None:
        """Whose turn it is, where there is a seat and may be room."""
        return self._turns.next(self._may_try) if len(self._running) < self._limits.max_num_seqs else None

    def who_yields(self) -> Sequence | None:
        """Whom to send back, so that an owner that waits gets what it has less of than its share."""
        if not len(self._turns):
            return None
        victim = self._shares.yields_seat(lambda s: not self.must_wait(s))
        if victim is None and len(self._running) < self._limits.max_num_seqs:
            for other, version in self._blocked.values():
                if version == self._version() and other.status is Status.WAITING:
                    victim = victim or self._shares.yields_room(other, self._limits.blocks_of(other.num_tokens))
        return victim

    def _version(self) -> tuple[object, ...]:
        """Another one when somebody let go of blocks or slots, or a prompt is on its way that another might wait for.

        Without either, a request that found no room finds none. What is newly cached does not count: where it would
        save a request much, that request waits for it.
        """
        newest = self._running[-1].id if self._running else ""
        return self._blocks.num_releases, self._slots.num_releases, newest

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether another computes just now what this one needs, or a prefix for it is on its way."""
        num_running = self._turns.num_running
        return self._sharing.must_wait(sequence) or self._sharing.must_fetch(
            sequence, may_displace=lambda other: num_running(sequence.owner) < num_running(other.owner)
        )

    def admit(self, sequence: Sequence) -> bool:
        """Lend a slot and the blocks of all known tokens, those of a cached prefix among them."""
        tokens = sequence.token_range(0, sequence.num_tokens)
        reach: Reach = "idle" if self._turns.num_running(sequence.owner) else "all"
        spare = self._kept_free()
        hit = self._sharing.find(
            sequence,
            tokens,
            has_room=lambda b, s: self._shares.make_room(b and b + spare, s, sequence.owner, reach=reach),
        )
        if hit.num_tokens and not self._has_room_for(sequence, hit, reach):
            # What is to be copied takes room too: without it there may be enough.
            self._sharing.release(hit)
            hit = NO_HIT
        if not self._has_room_for(sequence, hit, reach):
            self._blocked[sequence.owner] = (sequence, self._version())
            return False
        self._blocked.pop(sequence.owner, None)
        self._turns.remove(sequence)
        self._turns.begin(sequence)
        self._running.append(sequence)
        for other, _ in self._blocked.values():
            other.num_passed += 1
        sequence.status, sequence.wait, sequence.fetch = Status.RUNNING, None, None
        sequence.blocks = [
            *hit.blocks,
            *self._blocks.allocate(self._limits.blocks_of(len(tokens)) - len(hit.blocks), sequence.owner),
        ]
        (sequence.slot,) = self._slots.allocate(1, sequence.owner)
        sequence.num_turn_steps = sequence.num_passed = 0
        sequence.num_computed_tokens = sequence.num_reused_tokens = hit.num_tokens
        sequence.num_admissions += 1
        self._sharing.begin(sequence, tokens, hit)
        return True

    def _has_room_for(self, sequence: Sequence, hit: Hit, reach: Reach) -> bool:
        num_blocks = self._limits.blocks_of(sequence.num_tokens) - len(hit.blocks) + self._kept_free()
        return self._shares.make_room(num_blocks, 1, sequence.owner, reach=reach)

    def _kept_free(self) -> int:
        """Blocks beside those of a new sequence: one for each that runs and may still grow, lest the new one be sent
        back at once."""
        return sum(len(each.blocks) < self._limits.blocks_of(each.max_cached_tokens) for each in self._running)

    def _may_try(self, sequence: Sequence) -> bool:
        """Whether there may be room for the first waiting request of an owner. Another owner's that found none is
        passed within one's share, and not for ever."""
        version = self._version()
        found = self._blocked.get(sequence.owner)
        if found is not None and found == (sequence, version):
            return False
        for owner, (other, then) in list(self._blocked.items()):
            if other.status is not Status.WAITING:
                del self._blocked[owner]
            elif owner != sequence.owner and then == version:
                is_starved = other.num_passed >= _MAX_PASSED * self._limits.max_num_seqs
                if is_starved and not self._turns.num_running(owner):
                    return False
                if not self._shares.is_within(sequence.owner, self._limits.blocks_of(sequence.num_tokens)):
                    return False
        return True
