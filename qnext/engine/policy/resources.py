"""What the requests of a scheduler compete for, and what settles who gets it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qnext.engine.policy.archive import Archive
from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.prefix import PrefixCache
from qnext.engine.policy.sequence import Sequence
from qnext.engine.policy.shares import Shares
from qnext.engine.policy.sharing import AnySharing, NoSharing, Sharing
from qnext.engine.policy.step import EngineLimits
from qnext.engine.policy.turns import Turns


class Resources(NamedTuple):
    """Those of one scheduler. `running` are the sequences that have a seat, in the order of their admission."""

    limits: EngineLimits
    blocks: RefPool
    slots: RefPool
    turns: Turns
    running: list[Sequence]
    shares: Shares
    sharing: AnySharing

    @classmethod
    def of(cls, limits: EngineLimits, archive: Archive | None, clock: Callable[[], float]) -> Resources:
        """`clock` gives seconds that never run back."""
        blocks = RefPool(limits.num_blocks or 0, name="block")
        slots = RefPool(limits.num_slots, name="slot")
        spill_tokens = archive.chunk_tokens if archive is not None else 0
        prefixes = PrefixCache.of(limits, blocks, slots, spill_tokens=spill_tokens)
        turns, running = Turns(limits.max_num_seqs), list[Sequence]()
        shares = Shares(blocks, slots, prefixes, turns, running, clock)
        sharing: AnySharing = NoSharing()
        if prefixes is not None:
            interval = limits.checkpoint_interval
            sharing = Sharing(prefixes, slots, shares, archive, checkpoint_interval=interval)
        return cls(limits, blocks, slots, turns, running, shares, sharing)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that a sequence still needs for so many tokens."""
        return max(0, self.limits.blocks_of(num_tokens) - len(sequence.blocks))

    def check_integrity(self) -> None:
        """No block or slot is lost or doubled, or held by what neither runs nor is cached."""
        blocks = (block for sequence in self.running for block in sequence.blocks)
        self.blocks.check_integrity((*blocks, *self.sharing.held_blocks()))
        slots = (sequence.slot for sequence in self.running if sequence.slot is not None)
        self.slots.check_integrity((*slots, *self.sharing.held_slots()))
        self.sharing.check_integrity()
