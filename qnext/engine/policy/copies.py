"""Copies of states and blocks that the next step makes, and what they read, held until they were made. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.prefix import Hit, PrefixCache

Pairs = tuple[tuple[int, int], ...]


class Copies:
    """Those of one scheduler, as pairs (from, to). `drain` them into a plan; when that is over, `release` the ends."""

    def __init__(self, slots: RefPool, prefixes: PrefixCache) -> None:
        self._slots = slots
        self._prefixes = prefixes
        self.of_slots: list[tuple[int, int]] = []
        self._of_blocks: list[tuple[int, int]] = []
        self._sources: list[Hit] = []
        self._held_slots: list[int] = []

    def begin(self, hit: Hit, slot: int, blocks: list[int]) -> None:
        """A request with its own slot and blocks goes on from a hit, which it holds."""
        self._sources.append(hit)
        if hit.slot is not None:
            self.of_slots.append((hit.slot, slot))
        if hit.tail_block is not None:
            self._of_blocks.append((hit.tail_block, blocks[len(hit.blocks)]))

    def keep(self, source: int, target: int) -> None:
        """The state in slot `source` is to be kept in `target`, which was lent for that."""
        self._slots.share([source])
        self._held_slots += [source, target]
        self.of_slots.append((source, target))

    def drain(self) -> tuple[Pairs, Pairs]:
        """Copies of blocks, and of slots."""
        drained = tuple(self._of_blocks), tuple(self.of_slots)
        self._of_blocks, self.of_slots = [], []
        return drained

    def release(self) -> None:
        """They were made."""
        for hit in self._sources:
            self._prefixes.release_sources(hit)
        self._slots.free(self._held_slots)
        self._sources, self._held_slots = [], []

    def held_blocks(self) -> Iterator[int]:
        yield from (hit.tail_block for hit in self._sources if hit.tail_block is not None)

    def held_slots(self) -> Iterator[int]:
        yield from (hit.slot for hit in self._sources if hit.slot is not None)
        yield from self._held_slots
