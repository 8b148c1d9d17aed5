"""Which prefixes can be continued. Integers only, no torch.

Full blocks of computed tokens form a trie, and a prefix of a model with recurrent states is usable only where a
checkpoint lies; `prefix_trie.py` has both, docs/hybrid-cache.md the whole design.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.flights import Flight, Wait
from qnext.engine.policy.prefix_check import check_trie
from qnext.engine.policy.prefix_node import Node, Spill, Tokens, common_prefix
from qnext.engine.policy.prefix_trie import Evicted, PrefixTrie
from qnext.engine.policy.step import EngineLimits


class Hit(NamedTuple):
    """A usable prefix. `tail_block` and `slot` are to be copied into the request's own, never written to."""

    num_tokens: int
    blocks: tuple[int, ...]  # full blocks in order, shared
    tail_block: int | None  # its first num_tokens % block_size tokens count
    slot: int | None


@dataclass
class PrefixStatistics:
    """Counts since the cache was made. Looked up and hit are tokens of admitted requests."""

    num_requests: int = 0
    num_hits: int = 0  # requests of which a prefix was cached
    tokens_looked_up: int = 0
    tokens_hit: int = 0
    num_checkpoints_made: int = 0
    num_checkpoints_evicted: int = 0
    num_blocks_evicted: int = 0


class PrefixCache:
    """Prefixes of one model. `blocks` is None without full attention, `slots` is None without recurrent states.

    The cache is one owner among others in both pools. It shares what it is shown and lets go of that only in `evict`;
    callers let go of their own with `free`, whether the cache took a share or not. The order of calls for a request,
    with an example, stands in docs/hybrid-cache.md ("The life of a prefix").
    """

    def __init__(
        self,
        *,
        block_size: int,
        blocks: RefPool | None,
        slots: RefPool | None,
        grid: int = 1,
        min_tokens: int = 64,
        half_life: int = 256,
        spill_blocks: int = 0,
    ) -> None:
        """Stops lie on multiples of `grid`; for fewer than `min_tokens` tokens nobody stops or waits. With
        `spill_blocks`, `drain_spills` tells what was evicted: see PrefixTrie."""
        assert block_size > 0 and grid > 0 and min_tokens > 0 and half_life > 0
        assert blocks is not None or slots is not None
        self.block_size = block_size
        self.blocks = blocks
        self.slots = slots
        self.grid = grid
        self.min_tokens = min_tokens
        self.half_life = half_life
        self.statistics = PrefixStatistics()
        self._trie = PrefixTrie(block_size=block_size, blocks=blocks, slots=slots, spill_blocks=spill_blocks)
        self._flights: dict[Flight, None] = {}  # in the order of their announcement

    @classmethod
    def of(cls, limits: EngineLimits, blocks: RefPool, slots: RefPool, *, spill_tokens: int = 0) -> PrefixCache | None:
        """The one of a scheduler; None where nothing is to be cached."""
        if not limits.has_prefix_cache or (limits.num_blocks is None and not limits.has_states):
            return None
        return cls(
            block_size=limits.block_size,
            blocks=blocks if limits.num_blocks is not None else None,
            slots=slots if limits.has_states else None,
            grid=limits.chunk_size,
            min_tokens=limits.min_prefix_tokens,
            spill_blocks=spill_tokens // limits.block_size,
        )

    @property
    def num_checkpoints(self) -> int:
        return len(self._trie.checkpoints.by_slot)

    @property
    def num_blocks(self) -> int:
        """That cached prefixes hold, alone or together with requests."""
        return 0 if self.blocks is None else self.blocks.num_kept

    def owned_blocks(self) -> Iterator[int]:
        """Every block once for each share of the cache, for the integrity check of the pool."""
        return iter(()) if self.blocks is None else self.blocks.kept()

    def owned_slots(self) -> Iterator[int]:
        return iter(self._trie.checkpoints.by_slot)

    def lookup(self, tokens: Tokens, *, salt: str, limit: int) -> Hit:
        """The longest usable prefix of at most `limit` tokens. Changes nothing and pins nothing."""
        path = self._trie.walk(tokens, salt=salt, limit=limit)
        slot = tail_block = None
        if self.slots is not None:
            checkpoint = self._trie.deepest_checkpoint(path, tokens, limit=limit)
            if checkpoint is None:
                return Hit(0, (), None, None)
            path = path[: checkpoint.node.depth + 1]
            num_tokens, slot, tail_block = checkpoint.num_tokens, checkpoint.slot, checkpoint.tail_block
        else:
            num_tokens = max(0, len(path) - 1) * self.block_size
        return Hit(num_tokens, tuple(n.block for n in path if n.block is not None), tail_block, slot)

    def acquire(self, tokens: Tokens, *, salt: str, limit: int) -> Hit:
        """`lookup`, with the caller as one more owner of all that the hit names."""
        hit = self.lookup(tokens, salt=salt, limit=limit)
        if self.blocks is not None:
            self.blocks.share(hit.blocks)
            self.blocks.share(_optional(hit.tail_block))
        if self.slots is not None:
            self.slots.share(_optional(hit.slot))
        return hit

    def release(self, hit: Hit) -> None:
        """Undo `acquire`."""
        if self.blocks is not None:
            self.blocks.free(hit.blocks)
        self.release_sources(hit)

    def release_sources(self, hit: Hit) -> None:
        """Let go of what has been copied; the shared blocks stay with the request."""
        if self.blocks is not None:
            self.blocks.free(_optional(hit.tail_block))
        if self.slots is not None:
            self.slots.free(_optional(hit.slot))

    def announce(self, tokens: Tokens, *, salt: str, hit: Hit, stops: Iterable[int] = ()) -> Flight:
        """A request is admitted, with `hit` acquired. This is where its use of the prefix is counted.

        With states the flight stops where these tokens leave a known path, one token before their end, and at `stops`
        (ends of turns, every so many tokens), each rounded down to the grid.
        """
        self.statistics.num_requests += 1
        self.statistics.num_hits += hit.num_tokens > 0
        self.statistics.tokens_looked_up += len(tokens)
        self.statistics.tokens_hit += hit.num_tokens
        flight = Flight(tokens, salt, hit.num_tokens, hit.num_tokens)
        if self.slots is not None:
            branch = self.branch_point(tokens, salt=salt)
            for stop, is_shared in (*((stop, False) for stop in stops), (len(tokens) - 1, False), (branch, True)):
                stop = min(stop, len(tokens) - 1) // self.grid * self.grid
                if stop - hit.num_tokens >= self.min_tokens:
                    flight.stops[stop] = flight.stops.get(stop, False) or is_shared
            if hit.slot is not None:
                self._trie.checkpoints.count_hit(self._trie.checkpoints.by_slot[hit.slot], self._now)
        else:
            for node in self._trie.walk(tokens, salt=salt, limit=hit.num_tokens):
                self._trie.warm(node, self._now)
        self._flights[flight] = None
        return flight

    def land(self, flight: Flight) -> None:
        """The prompt is computed, or never will be."""
        flight.is_over = True
        del self._flights[flight]

    def wait(self, tokens: Tokens, *, salt: str, limit: int, flights: Iterable[Flight] | None = None) -> Wait | None:
        """Whether a running request is about to compute more of these tokens than `lookup` finds. Asks all `flights`,
        or only these.

        With states it is made to stop where the two part.
        """
        grid = self.block_size if self.slots is None else self.grid
        best: Wait | None = None
        for flight in self._flights if flights is None else flights:
            if not flight.may_lead(tokens, salt):
                continue  # nearly always told by one token, which spares comparing all of a long prompt
            parting = min(common_prefix(flight.tokens, tokens), limit) // grid * grid
            can_wait = parting > flight.num_computed if self.slots is None else flight.can_stop_at(parting)
            if can_wait and (best is None or parting > best.num_tokens):
                best = Wait(flight, parting)
        if best is None or best.num_tokens < self.min_tokens:
            return None
        if best.num_tokens < self.lookup(tokens, salt=salt, limit=limit).num_tokens + self.min_tokens:
            return None
        if self.slots is not None:
            best.flight.stops[best.num_tokens] = True
        return best

    def branch_point(self, tokens: Tokens, *, salt: str) -> int:
        """The deepest token count at which these tokens leave a path that is cached or just being computed."""
        in_flight = (common_prefix(flight.tokens, tokens) for flight in self._flights if flight.salt == salt)
        return max(self._trie.num_known(tokens, salt=salt), *in_flight, 0)

    def insert(
        self, tokens: Tokens, blocks: Sequence[int], *, salt: str, owner: str = "", flight: Flight | None = None
    ) -> None:
        """Share the full blocks of computed tokens. `blocks` are the request's, in order. O(len(tokens)).

        With its `flight`, whose tokens these are, only those that it has computed, in O(those since the last time).
        """
        end = len(tokens) if flight is None else flight.num_computed
        if self.blocks is not None and end >= self.block_size:
            self._extend(tokens, blocks, salt, owner, end, flight)

    def add_checkpoint(
        self,
        tokens: Tokens,
        blocks: Sequence[int],
        *,
        salt: str,
        slot: int,
        owner: str = "",
        is_shared: bool = False,
        flight: Flight | None = None,
    ) -> None:
        """`insert`, and share `slot`, which holds the state after exactly these; not where one lies there already.

        The block of the last tokens is shared too where it is not full. The request may go on writing behind them.
        """
        end = len(tokens) if flight is None else flight.num_computed
        assert end > 0
        node = self._extend(tokens, blocks, salt, owner, end, flight)
        num_full, num_rest = divmod(end, self.block_size)
        tail_block = blocks[num_full] if num_rest and self.blocks is not None else None
        tail = tokens[num_full * self.block_size : end]
        self.statistics.num_checkpoints_made += self._trie.add_checkpoint(
            node, tail, slot=slot, tail_block=tail_block, is_shared=is_shared, now=self._now
        )

    def _extend(
        self, tokens: Tokens, blocks: Sequence[int], salt: str, owner: str, end: int, flight: Flight | None
    ) -> Node:
        start = flight.node if flight is not None else None
        node = self._trie.extend(tokens, blocks, salt=salt, owner=owner, now=self._now, end=end, start=start)
        if flight is not None:
            flight.node = node
        return node

    def evict(
        self, *, num_blocks: int = 0, num_slots: int = 0, owner: str = "", exposed: Collection[str] | None = ()
    ) -> Evicted:
        """Give back so many blocks and slots, or a few more; nothing at all where that much is surely not to be had.

        `owner` needs the room. Whoever holds more than its share gives first, then `owner`, then those that are
        `exposed`; None exposes all. It can still be less than was asked for, when blocks that nobody holds lie above
        some that a request holds.
        """
        evicted = self._trie.evict(num_blocks=num_blocks, num_slots=num_slots, owner=owner, exposed=exposed)
        self.statistics.num_blocks_evicted += len(evicted.blocks)
        self.statistics.num_checkpoints_evicted += len(evicted.slots)
        return evicted

    def known_blocks(self, tokens: Tokens, *, salt: str) -> list[int]:
        """The full blocks of these tokens that are cached, from the first on, with or without a checkpoint."""
        path = self._trie.walk(tokens, salt=salt, limit=len(tokens))
        return [node.block for node in path if node.block is not None]

    def note_spill(self, tokens: Tokens, blocks: Sequence[int], *, salt: str, owner: str, slot: int) -> None:
        """Have a prefix kept elsewhere although it is not evicted; `slot` holds the state after exactly `tokens`."""
        self._trie.spills.append(Spill(tokens, salt, owner, tuple(blocks), slot if self.slots is not None else None))

    @property
    def has_spills(self) -> bool:
        return bool(self._trie.spills)

    def drain_spills(self) -> list[Spill]:
        """What is to be kept elsewhere since the last call. To be read before the next step writes anything."""
        spills, self._trie.spills = self._trie.spills, []
        return spills

    def everything(self) -> list[Spill]:
        """All that is cached and worth keeping elsewhere, what is worth most last."""
        return self._trie.everything()

    def clear(self) -> None:
        """Forget all that is cached; who holds a hit still holds it."""
        self._trie.clear()
        for flight in self._flights:
            flight.node = None

    def forget(self, slots: Iterable[int]) -> None:
        """Forget the checkpoints in those of these slots that hold one: their states are not what they should be."""
        for slot in slots:
            if slot in self._trie.checkpoints.by_slot:
                self._trie.forget(slot)

    def check_integrity(self) -> None:
        """All that the cache holds hangs together, and both pools know of its shares."""
        check_trie(self._trie)
        assert all(not flight.is_over for flight in self._flights)

    @property
    def _now(self) -> float:
        """The heat of one use at this moment."""
        return self.statistics.num_requests / self.half_life


def _optional(index: int | None) -> list[int]:
    return [] if index is None else [index]
