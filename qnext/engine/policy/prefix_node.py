"""Nodes and checkpoints of the trie of cached prefixes, and where they stand to each other. Integers only, no torch."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import NamedTuple

Tokens = tuple[int, ...]

MANY_WAYS = 16  # from one node on, so many that they are kept in order


@dataclass(eq=False, slots=True)
class Node:
    salt: str
    owner: str
    key: Tokens
    parent: Node | None
    depth: int  # blocks from the root, this one included
    block: int | None
    heat: float  # kept up to date only where there are no checkpoints
    children: dict[Tokens, Node] = field(default_factory=dict)
    checkpoints: dict[Tokens, Checkpoint] = field(default_factory=dict)  # by the tokens behind the node
    ways: list[Tokens] | None = None  # keys of both, sorted, where they are many
    is_gone: bool = False
    jump: Node | None = None  # some node above; see `at_depth`

    def __post_init__(self) -> None:
        # Either the parent or as far again as the last two jumps above went, so that every depth is a few steps away.
        up = self.parent
        if up is not None and up.jump is not None and up.jump.jump is not None:
            is_even = up.depth - up.jump.depth == up.jump.depth - up.jump.jump.depth
            self.jump = up.jump.jump if is_even else up
        else:
            self.jump = up

    @property
    def is_bare(self) -> bool:
        return not self.children and not self.checkpoints

    def at_depth(self, depth: int) -> Node:
        """The node of that depth on the path to this one. O(log of the depth)."""
        node = self
        while node.depth > depth:
            assert node.parent is not None and node.jump is not None
            node = node.jump if node.jump.depth >= depth else node.parent
        return node

    def num_shared(self, rest: Tokens) -> int:
        """The most tokens that `rest` shares with a way on from here. O(log of the ways)."""
        ways: Iterable[Tokens] = itertools.chain(self.children, self.checkpoints)
        if self.ways is None and len(self.children) + len(self.checkpoints) > MANY_WAYS:
            self.ways = sorted(ways)
        if self.ways is not None:
            place = bisect_left(self.ways, rest)  # what shares most with it stands beside it
            ways = self.ways[max(0, place - 1) : place + 1]
        return max((common_prefix(way, rest) for way in ways), default=0)

    def note_way(self, way: Tokens) -> None:
        if self.ways is not None:
            insort(self.ways, way)

    def forget_way(self, way: Tokens) -> None:
        if self.ways is not None:
            del self.ways[bisect_left(self.ways, way)]


@dataclass(eq=False, slots=True)
class Checkpoint:
    node: Node
    tail: Tokens
    num_tokens: int
    slot: int
    tail_block: int | None
    above: Checkpoint | None
    heat: float
    num_hits: int
    below: dict[Checkpoint, None] = field(default_factory=dict)  # those whose `above` is this one

    @property
    def owner(self) -> str:
        return self.node.owner

    @property
    def distance(self) -> int:
        return self.num_tokens - (self.above.num_tokens if self.above else 0)

    def is_below(self, upper: Checkpoint) -> bool:
        """Whether the path of this one goes through `upper`."""
        if self.num_tokens <= upper.num_tokens or self.node.salt != upper.node.salt:
            return False
        node, following = self.node, self.tail
        if node.depth > upper.node.depth:
            below = node.at_depth(upper.node.depth + 1)
            assert below.parent is not None
            node, following = below.parent, below.key
        return node is upper.node and following[: len(upper.tail)] == upper.tail


class Spill(NamedTuple):
    """A prefix that is to be kept elsewhere. Its blocks and slot may be lent again, but are not written to before the
    next step.

    `blocks` hold at least all its tokens; `slot` the state after exactly these, None for a model without states.
    """

    tokens: Tokens
    salt: str
    owner: str
    blocks: tuple[int, ...]
    slot: int | None


def path_to(node: Node) -> Spill:
    """All that leads to a node, without a state."""
    keys: list[Tokens] = []
    blocks: list[int] = []
    place = node
    while place.parent is not None:
        keys.append(place.key)
        blocks += [] if place.block is None else [place.block]
        place = place.parent
    tokens = tuple(itertools.chain.from_iterable(reversed(keys)))
    return Spill(tokens, node.salt, node.owner, tuple(reversed(blocks)), None)


def spill_of(checkpoint: Checkpoint) -> Spill:
    """A checkpoint and all that leads to it."""
    path, tail_block = path_to(checkpoint.node), checkpoint.tail_block
    blocks = path.blocks if tail_block is None else (*path.blocks, tail_block)
    return path._replace(tokens=path.tokens + checkpoint.tail, blocks=blocks, slot=checkpoint.slot)


def last_on_way(node: Node, key: Tokens | None, above: Checkpoint | None) -> Checkpoint | None:
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
