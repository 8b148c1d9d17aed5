"""What is cached of which prefixes, and what goes first when room is short. Integers only, no torch.

A node of the trie is a full block of tokens, its key the exact tokens in it (never a hash of them), and every `salt`
has a root of its own. A checkpoint hangs on the node of the last full block before it.

What goes first. The heat of a thing is log2 of the sum of 2^(t / half_life) over its uses, where t counts admitted
requests: a use counts half as much after `half_life` more of them, and heats compare without knowing the time. The
creation is a use. The first hit of a checkpoint replaces it and counts 1/8 only: who comes back first is as a rule the
same conversation, which leaves a newer checkpoint further down. From the second hit on, or where other requests are
known to part (`is_shared`), the prefix is one that many have, and each hit counts as one.

- A slot is wanted: the checkpoint with the least  distance x 2^heat  goes, where distance is how many tokens would
  have to be computed again: from the checkpoint above it on its path (or from 0) to its own place.
- Blocks are wanted: first what no checkpoint needs, then checkpoints that have none below them, the coldest first. The
  tokens that such a checkpoint saves and the blocks that it alone keeps grow together, so that heat alone decides.
- Without states there are no checkpoints: the coldest block that has none below it goes.

Slots are all of one size, and so are blocks, so that the bytes which are won do not appear in the comparison. Among
equals the oldest goes. A checkpoint that goes leaves its heat to the one above, which will now get its hits. Blocks go
from the leaves up, and with the last checkpoint at or below them. What a request holds never goes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2
from typing import NamedTuple

from qnext.engine.scheduling.blocks import RefPool

Tokens = tuple[int, ...]

FIRST_HIT = -3.0  # log2 of what the first hit of a checkpoint counts


class Duplicate(NamedTuple):
    """Block number `place` of a request holds the same as `kept`, which the cache had already."""

    place: int
    block: int
    kept: int


class Evicted(NamedTuple):
    """Ids that went back to their pools."""

    blocks: list[int]
    slots: list[int]


class Spill(NamedTuple):
    """A prefix that is to be kept elsewhere. Its blocks and slot may be lent again, but are not written to before the
    next step.

    `blocks` hold at least all its tokens; `slot` the state after exactly these, None for a model without states.
    """

    tokens: Tokens
    salt: str
    blocks: tuple[int, ...]
    slot: int | None


@dataclass(eq=False)
class Node:
    salt: str
    key: Tokens
    parent: Node | None
    depth: int  # blocks from the root, this one included
    block: int | None
    heat: float  # kept up to date only where there are no checkpoints
    children: dict[Tokens, Node] = field(default_factory=dict)
    checkpoints: dict[Tokens, Checkpoint] = field(default_factory=dict)  # by the tokens behind the node

    @property
    def is_bare(self) -> bool:
        return not self.children and not self.checkpoints


@dataclass(eq=False)
class Checkpoint:
    node: Node
    tail: Tokens
    num_tokens: int
    slot: int
    tail_block: int | None
    above: Checkpoint | None
    heat: float
    num_hits: int

    @property
    def distance(self) -> int:
        return self.num_tokens - (self.above.num_tokens if self.above else 0)

    def count_hit(self, now: float) -> None:
        self.heat = now + FIRST_HIT if self.num_hits == 0 else add_heat(self.heat, now)
        self.num_hits += 1


class PrefixTrie:
    """The trie and its shares in both pools. `now` is the heat of one use at that moment."""

    def __init__(
        self, *, block_size: int, blocks: RefPool | None, slots: RefPool | None, spill_blocks: int = 0
    ) -> None:
        """With `spill_blocks`, what is evicted is noted in `spills`: every checkpoint, or without states every path of
        so many blocks or a multiple."""
        self.block_size = block_size
        self.spill_blocks = spill_blocks
        self.spills: list[Spill] = []
        self.blocks = blocks
        self.slots = slots
        self.roots: dict[str, Node] = {}
        self.checkpoints: dict[int, Checkpoint] = {}  # by slot, oldest first
        self.num_shares: Counter[int] = Counter()  # in each block
        self._bare: dict[Node, None] = {}  # nodes with nothing below and no checkpoint

    def walk(self, tokens: Tokens, *, salt: str, limit: int) -> list[Node]:
        """The root and the nodes of the first full blocks of `tokens`, as far as they are there; [] without a root."""
        assert limit <= len(tokens)
        node = self.roots.get(salt)
        path: list[Node] = []
        end = 0
        while node is not None:
            path.append(node)
            start, end = end, end + self.block_size
            node = node.children.get(tokens[start:end]) if end <= limit else None
        return path

    def deepest_checkpoint(self, path: list[Node], tokens: Tokens, *, limit: int) -> Checkpoint | None:
        """The last checkpoint of at most `limit` tokens along a path that `walk` gave."""
        for node in reversed(path):
            if node.checkpoints:
                start = node.depth * self.block_size
                for end in range(min(start + self.block_size - 1, limit), start - 1, -1):
                    checkpoint = node.checkpoints.get(tokens[start:end])
                    if checkpoint is not None:
                        return checkpoint
        return None

    def num_known(self, tokens: Tokens, *, salt: str) -> int:
        """How many leading tokens lie on some path of the trie."""
        path = self.walk(tokens, salt=salt, limit=len(tokens))
        if not path:
            return 0
        start = path[-1].depth * self.block_size
        rest = tokens[start : start + self.block_size]
        ways = itertools.chain(path[-1].children, path[-1].checkpoints)
        return start + max((common_prefix(way, rest) for way in ways), default=0)

    def extend(
        self, tokens: Tokens, blocks: Sequence[int], *, salt: str, now: float
    ) -> tuple[list[Node], list[Duplicate]]:
        """Make the nodes of all full blocks that are missing; returns the whole path."""
        if salt not in self.roots:
            self.roots[salt] = Node(salt, (), None, 0, None, now)
        path = self.walk(tokens, salt=salt, limit=len(tokens))
        duplicates = []
        if self.blocks is not None:
            assert len(blocks) * self.block_size >= len(tokens), "tokens without blocks"
            for index, node in enumerate(path[1:]):
                assert node.block is not None
                if node.block != blocks[index]:
                    duplicates.append(Duplicate(index, blocks[index], node.block))
        for index in range(len(path) - 1, len(tokens) // self.block_size):
            key = tokens[index * self.block_size : (index + 1) * self.block_size]
            block = blocks[index] if self.blocks is not None else None
            node = Node(salt, key, path[-1], index + 1, block, now)
            self._share_block(block)
            path[-1].children[key] = node
            self._bare.pop(path[-1], None)
            self._bare[node] = None
            path.append(node)
        return path, duplicates

    def add_checkpoint(
        self, path: list[Node], tokens: Tokens, *, slot: int, tail_block: int | None, is_shared: bool, now: float
    ) -> bool:
        """Share a slot with the state after `tokens`, whose path `extend` gave. False if one lies there already."""
        assert self.slots is not None and slot not in self.checkpoints
        node = path[-1]
        tail = tokens[node.depth * self.block_size :]
        known = node.checkpoints.get(tail)
        if known is not None:
            known.num_hits = max(known.num_hits, int(is_shared))
            return False
        above = self.deepest_checkpoint(path, tokens, limit=len(tokens) - 1)
        checkpoint = Checkpoint(node, tail, len(tokens), slot, tail_block, above, now, int(is_shared))
        for other in self.checkpoints.values():
            if other.above is above and self._is_below(other, checkpoint):
                other.above = checkpoint
        self.slots.share([slot])
        self._share_block(tail_block)
        self.checkpoints[slot] = node.checkpoints[tail] = checkpoint
        self._bare.pop(node, None)
        return True

    def evict(self, *, num_blocks: int, num_slots: int) -> Evicted:
        """Give back so many blocks and slots, or a few more; nothing at all where that much is surely not to be had."""
        evicted = Evicted([], [])
        num_loose = sum(not self._is_slot_pinned(c) for c in self.checkpoints.values())
        if num_slots > num_loose or num_blocks > sum(not self._is_pinned(block) for block in self.num_shares):
            return evicted
        if num_blocks and self.slots is None:
            self._evict_leaves(num_blocks, evicted)
        elif num_blocks:
            self._evict_with_checkpoints(num_blocks, evicted)
        while len(evicted.slots) < num_slots:
            loose = (c for c in self.checkpoints.values() if not self._is_slot_pinned(c))
            self._remove_checkpoint(min(loose, key=lambda c: log2(c.distance) + c.heat), evicted)
        return evicted

    def _evict_leaves(self, num_blocks: int, evicted: Evicted) -> None:
        age = itertools.count()
        heap = [(node.heat, next(age), node) for node in self._bare if not self._is_pinned(node.block)]
        heapq.heapify(heap)
        while heap and len(evicted.blocks) < num_blocks:
            parent = self._remove_leaf(heapq.heappop(heap)[2], evicted)
            if parent in self._bare and not self._is_pinned(parent.block):
                heapq.heappush(heap, (parent.heat, next(age), parent))

    def _evict_with_checkpoints(self, num_blocks: int, evicted: Evicted) -> None:
        for node in list(self._bare):
            if len(evicted.blocks) >= num_blocks:
                return
            self._prune(node, evicted)
        while len(evicted.blocks) < num_blocks:
            uppers = {c.above for c in self.checkpoints.values()}
            useful = [c for c in self.checkpoints.values() if not self._is_slot_pinned(c) and self._keeps_blocks(c)]
            if not useful:
                return
            # One that others lie below comes last: only the block of its last tokens is to be had.
            self._remove_checkpoint(min(useful, key=lambda c: (c in uppers, c.heat)), evicted)

    def _keeps_blocks(self, checkpoint: Checkpoint) -> bool:
        """Whether blocks are there only for this checkpoint, or for it and others behind the same node."""
        node, tail_block = checkpoint.node, checkpoint.tail_block
        if tail_block is not None and not self._is_pinned(tail_block):
            return all(child.block != tail_block for child in node.children.values())
        return not node.children and len(node.checkpoints) == 1 and not self._is_pinned(node.block)

    def _is_below(self, lower: Checkpoint, upper: Checkpoint) -> bool:
        """Whether the path of `lower` goes through `upper`."""
        if lower.num_tokens <= upper.num_tokens or lower.node.salt != upper.node.salt:
            return False
        node, following = lower.node, lower.tail
        while node.depth > upper.node.depth and node.parent is not None:
            node, following = node.parent, node.key
        return node is upper.node and following[: len(upper.tail)] == upper.tail

    def _is_pinned(self, block: int | None) -> bool:
        """Whether somebody else holds the block."""
        return block is not None and self.blocks is not None and self.blocks.num_owners(block) > self.num_shares[block]

    def _is_slot_pinned(self, checkpoint: Checkpoint) -> bool:
        assert self.slots is not None
        return self.slots.num_owners(checkpoint.slot) > 1

    def _share_block(self, block: int | None) -> None:
        if block is not None and self.blocks is not None:
            self.blocks.share([block])
            self.num_shares[block] += 1

    def _free_block(self, block: int | None, evicted: Evicted) -> None:
        if block is not None and self.blocks is not None:
            self.num_shares[block] -= 1
            if not self.num_shares[block]:
                del self.num_shares[block]
            self.blocks.free([block])
            if not self.blocks.num_owners(block):
                evicted.blocks.append(block)

    def everything(self) -> list[Spill]:
        """All that eviction would note, what is worth most last."""
        if self.slots is not None:
            return [_spill_of(c) for c in sorted(self.checkpoints.values(), key=lambda c: (c.heat, c.num_tokens))]
        nodes, found = list(self.roots.values()), []
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if self._is_spilled(node):
                found.append(node)
        return [_path_to(node) for node in sorted(found, key=lambda node: (node.heat, node.depth))]

    def _is_spilled(self, node: Node) -> bool:
        """Whether a node of a model without states is one at which a path is kept."""
        return bool(self.spill_blocks and self.slots is None and node.depth and node.depth % self.spill_blocks == 0)

    def clear(self) -> None:
        """Let go of everything, pinned or not."""
        if self.blocks is not None:
            self.blocks.free(self.num_shares.elements())
        if self.slots is not None:
            self.slots.free(self.checkpoints)
        for held in (self.roots, self.checkpoints, self.num_shares, self._bare, self.spills):
            held.clear()

    def _remove_checkpoint(self, checkpoint: Checkpoint, evicted: Evicted) -> None:
        """Together with all blocks that nothing needs then."""
        assert self.slots is not None
        node, above = checkpoint.node, checkpoint.above
        if self.spill_blocks:
            self.spills.append(_spill_of(checkpoint))
        del self.checkpoints[checkpoint.slot], node.checkpoints[checkpoint.tail]
        for other in self.checkpoints.values():
            if other.above is checkpoint:
                other.above = above
        if above is not None:
            above.heat = add_heat(above.heat, checkpoint.heat)
        self.slots.free([checkpoint.slot])
        evicted.slots.append(checkpoint.slot)
        self._free_block(checkpoint.tail_block, evicted)
        if node.is_bare:
            self._settle(node)
            self._prune(node, evicted)

    def _prune(self, node: Node, evicted: Evicted) -> None:
        """Remove a bare node and those above that it leaves bare, as far as nobody holds them."""
        while node in self._bare and not self._is_pinned(node.block):
            node = self._remove_leaf(node, evicted)

    def _remove_leaf(self, node: Node, evicted: Evicted) -> Node:
        """Remove a bare node; returns its parent."""
        assert node.is_bare and node.parent is not None
        if self._is_spilled(node):
            self.spills.append(_path_to(node))
        del self._bare[node], node.parent.children[node.key]
        self._free_block(node.block, evicted)
        if node.parent.is_bare:
            self._settle(node.parent)
        return node.parent

    def _settle(self, node: Node) -> None:
        """A node became bare: note it. A bare root goes at once."""
        if node.parent is None:
            del self.roots[node.salt]
        else:
            self._bare[node] = None

    def check_integrity(self) -> None:
        """The trie hangs together, and its shares are exactly what its nodes and checkpoints name."""
        shares: Counter[int] = Counter()
        checkpoints: dict[int, Checkpoint] = {}
        bare: set[Node] = set()
        for salt, root in self.roots.items():
            assert root.parent is None and root.depth == 0 and root.block is None and not root.is_bare
            nodes: list[tuple[Node, Checkpoint | None]] = [(root, None)]
            while nodes:
                node, above = nodes.pop()
                assert node.salt == salt and (node is root or len(node.key) == self.block_size)
                assert (node.block is None) == (self.blocks is None or node is root)
                shares.update([] if node.block is None else [node.block])
                for tail, checkpoint in node.checkpoints.items():
                    assert checkpoint.node is node and checkpoint.tail == tail and len(tail) < self.block_size
                    assert checkpoint.num_tokens == node.depth * self.block_size + len(tail) > 0
                    assert checkpoint.above is _last_on_way(node, tail[:-1] if tail else None, above)
                    assert (checkpoint.tail_block is None) == (self.blocks is None or not tail)
                    shares.update([] if checkpoint.tail_block is None else [checkpoint.tail_block])
                    assert checkpoint.slot not in checkpoints
                    checkpoints[checkpoint.slot] = checkpoint
                if node.is_bare:
                    bare.add(node)
                for key, child in node.children.items():
                    assert child.parent is node and child.key == key and child.depth == node.depth + 1
                    nodes.append((child, _last_on_way(node, key, above)))
        assert shares == self.num_shares and bare == self._bare.keys() and checkpoints == self.checkpoints
        assert all(self.blocks is not None and self.blocks.num_owners(b) >= n for b, n in shares.items())
        assert all(self.slots is not None and self.slots.num_owners(slot) >= 1 for slot in checkpoints)


def _path_to(node: Node) -> Spill:
    keys: list[Tokens] = []
    blocks: list[int] = []
    salt, place = node.salt, node
    while place.parent is not None:
        keys.append(place.key)
        blocks += [] if place.block is None else [place.block]
        place = place.parent
    return Spill(tuple(itertools.chain.from_iterable(reversed(keys))), salt, tuple(reversed(blocks)), None)


def _spill_of(checkpoint: Checkpoint) -> Spill:
    tokens, salt, blocks, _ = _path_to(checkpoint.node)
    tail_block = checkpoint.tail_block
    return Spill(
        tokens + checkpoint.tail, salt, blocks if tail_block is None else (*blocks, tail_block), checkpoint.slot
    )


def _last_on_way(node: Node, key: Tokens | None, above: Checkpoint | None) -> Checkpoint | None:
    """The last checkpoint of a node that a path passes which goes on with `key`; `above` if there is none."""
    on_way = [c for tail, c in node.checkpoints.items() if key is not None and key[: len(tail)] == tail]
    return max(on_way, key=lambda c: c.num_tokens, default=above)


def add_heat(a: float, b: float) -> float:
    """log2(2^a + 2^b)."""
    return max(a, b) + log2(1 + 2.0 ** -abs(a - b))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    end = min(len(a), len(b))
    start = 0
    step = 1024  # compared as a whole, which is many times faster than token by token
    while start + step <= end and a[start : start + step] == b[start : start + step]:
        start += step
    while start < end and a[start] == b[start]:
        start += 1
    return start
