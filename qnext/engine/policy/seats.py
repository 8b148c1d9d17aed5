"""What running sequences hold, and how they let go of it. No torch."""

from __future__ import annotations

from collections.abc import Collection

from qnext.engine.policy.resources import Resources
from qnext.engine.policy.sequence import Sequence, Status


class Seats:
    """Lends blocks to sequences that run, and takes seats back."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self.num_preemptions = 0

    def grow(self, sequence: Sequence, num_tokens: int, planned: Collection[Sequence]) -> bool:
        """Lend blocks for so many tokens. Others make room, of whoever holds most, but none that is `planned`; False
        where the request itself had to."""
        limits, blocks, _, turns, _, shares, _ = self._resources
        if num_tokens <= len(sequence.blocks) * limits.block_size:
            return True
        missing = self._resources.num_missing(sequence, num_tokens)
        if not missing:
            return True
        while not shares.make_room(missing, 0, sequence.owner, reach="idle"):
            victim = shares.yields_blocks(sequence, planned)
            is_only = victim is sequence and turns.num_running(sequence.owner) == 1
            if is_only and shares.make_room(missing, 0, sequence.owner, reach="all"):
                break
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(blocks.allocate(missing, sequence.owner))
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue. Its state stays in the cache as long as there is room."""
        self.num_preemptions += 1
        self.requeue(sequence, is_cached=True)

    def requeue(self, sequence: Sequence, *, is_cached: bool) -> None:
        """Back to the head of the queue; what was computed is cached, or else forgotten."""
        self.vacate(sequence, is_cached=is_cached)
        sequence.num_computed_tokens = 0
        sequence.was_looked_up = False
        sequence.status = Status.WAITING
        self._resources.turns.put_back(sequence)

    def vacate(self, sequence: Sequence, *, is_cached: bool) -> None:
        """It holds nothing any more; what others may go on from is cached, or not."""
        _, blocks, slots, turns, running, _, sharing = self._resources
        sharing.let_go(sequence, is_cached=is_cached)
        running.remove(sequence)
        turns.end(sequence)
        blocks.free(sequence.blocks)
        assert sequence.slot is not None
        slots.free([sequence.slot])
        sequence.blocks, sequence.slot, sequence.num_planned_blocks = [], None, 0
