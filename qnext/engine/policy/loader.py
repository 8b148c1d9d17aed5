"""When a request waits for a prefix from beyond the device's memory, and where that is put. No torch."""

from __future__ import annotations

from collections.abc import Callable

from qnext.engine.policy.archive import Archive, Fetch, Load
from qnext.engine.policy.prefix import PrefixCache
from qnext.engine.policy.prefix_node import Tokens
from qnext.engine.policy.sequence import Sequence, Status

_PATIENCE = 0.05  # seconds for which an engine that has nothing else to do waits for a file at a time


class Loader:
    """Brings prefixes back, one at a time, so that what has been read and not yet used stays bounded.

    While a prefix is read its request waits in the queue, and the others go on. When it has come it becomes a
    checkpoint like any other, and the request goes on from that.
    """

    def __init__(self, archive: Archive, prefixes: PrefixCache) -> None:
        self._archive = archive
        self._prefixes = prefixes
        self._current: Sequence | None = None
        self._is_open = False  # when it was last asked for
        self._loads: list[Load] = []
        self._placed: list[Fetch] = []  # held until they are written
        self.held_blocks: list[int] = []  # the loads' targets, until they are written
        self.held_slots: list[int] = []

    def must_wait(
        self, sequence: Sequence, tokens: Tokens, *, limit: int, may_displace: Callable[[Sequence], bool]
    ) -> bool:
        """Whether a longer prefix than the cache has is on its way. The tiers are asked once for each admission.

        A prefix that has come for another request is dropped where that has not been admitted since and
        `may_displace` says so: it is asked for again later.
        """
        if not sequence.was_looked_up:
            sequence.was_looked_up = True
            self._find(sequence, tokens, limit)
        while sequence.fetch is not None:
            other = self._busy_for(sequence)
            if other is not None:
                if other.fetch is None or other.fetch.is_open or not may_displace(other):
                    return True
                other.fetch, other.was_looked_up = None, False
            if self._current is not sequence:
                if self._num_cached(sequence, tokens, sequence.fetch.num_tokens) >= sequence.fetch.num_tokens:
                    sequence.fetch = None
                    return False
                self._current = sequence
                sequence.fetch.start()
            self._is_open = sequence.fetch.is_open
            if self._is_open or sequence.fetch.is_good:
                return self._is_open
            self._current = None
            self._find(sequence, tokens, sequence.fetch.num_tokens - 1)  # shorter each time, so it ends
        return False

    def place(self, sequence: Sequence, tokens: Tokens, *, has_room: Callable[[int, int], bool]) -> None:
        """Make what has come for a request a checkpoint, where there is room for that and for the request besides.

        `has_room` is asked for blocks and slots.
        """
        prefixes, fetch = self._prefixes, sequence.fetch
        if fetch is None or self._num_cached(sequence, tokens, fetch.num_tokens) >= fetch.num_tokens:
            sequence.fetch = None
            return
        size = prefixes.block_size
        tokens, num_own = tokens[: fetch.num_tokens], -(-len(tokens) // size) - fetch.num_tokens // size
        known = prefixes.known_blocks(tokens, salt=sequence.salt)
        if prefixes.blocks is None:
            missing = num_own = 0
        else:
            missing = -(-len(tokens) // size) - len(known)
            prefixes.blocks.share(known)  # lest they go to make room
        if has_room(missing + num_own, 1 if prefixes.slots is None else 2):
            blocks = [] if prefixes.blocks is None else prefixes.blocks.allocate(missing, sequence.owner)
            slot = None
            if prefixes.slots is None:
                prefixes.insert(tokens, [*known, *blocks], salt=sequence.salt, owner=sequence.owner)
            else:
                (slot,) = prefixes.slots.allocate(1, sequence.owner)
                prefixes.add_checkpoint(tokens, [*known, *blocks], salt=sequence.salt, owner=sequence.owner, slot=slot)
                self.held_slots.append(slot)
            self.held_blocks += blocks
            self._loads.append(Load(fetch.id, len(known), tuple(blocks), slot))
            self._placed.append(fetch)
            sequence.fetch = None
        if prefixes.blocks is not None:
            prefixes.blocks.free(known)

    @property
    def has_loads(self) -> bool:
        return bool(self._loads)

    def drain_loads(self) -> tuple[Load, ...]:
        """For the plan. Their targets are held until `release`."""
        loads = tuple(self._loads)
        self._loads.clear()
        return loads

    def release(self) -> None:
        """The step is over: the cache alone holds what was loaded."""
        if self._prefixes.blocks is not None:
            self._prefixes.blocks.free(self.held_blocks)
        if self._prefixes.slots is not None:
            self._prefixes.slots.free(self.held_slots)
        self.held_blocks, self.held_slots, self._placed = [], [], []

    def wait_a_moment(self) -> bool:
        """For an engine that can do nothing else. False where nothing is on its way."""
        current = self._current
        if not self._is_open or current is None or current.status is not Status.WAITING or current.fetch is None:
            return False
        current.fetch.wait(_PATIENCE)
        return True

    def _find(self, sequence: Sequence, tokens: Tokens, limit: int) -> None:
        above = self._num_cached(sequence, tokens, limit) + self._prefixes.min_tokens - 1
        sequence.fetch = self._archive.find(tokens, salt=sequence.salt, above=above, limit=limit)

    def _num_cached(self, sequence: Sequence, tokens: Tokens, limit: int) -> int:
        return self._prefixes.lookup(tokens, salt=sequence.salt, limit=limit).num_tokens

    def _busy_for(self, sequence: Sequence) -> Sequence | None:
        """Another request, whose prefix is on its way or has come and is not used yet."""
        current = self._current
        if current is None or current is sequence or current.status is not Status.WAITING:
            return None
        return None if current.fetch is None else current
