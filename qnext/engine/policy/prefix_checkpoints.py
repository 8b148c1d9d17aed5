"""The checkpoints of the trie of cached prefixes: which lies above which, and which goes first. No torch.

docs/hybrid-cache.md tells the order in which they go.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log2

from qnext.engine.policy.prefix_node import Checkpoint, Node, Tokens, add_heat, last_on_way
from qnext.engine.policy.ranking import OwnerRankings

FIRST_HIT = -3.0  # log2 of what the first hit of a checkpoint counts


class Checkpoints:
    """Each hangs below the last one before it on its path. `now` is the heat of one use at that moment."""

    def __init__(self) -> None:
        self.by_slot: dict[int, Checkpoint] = {}  # oldest first
        self.tops: dict[str, dict[Checkpoint, None]] = {}  # those with none above, by salt
        self.by_benefit: OwnerRankings[Checkpoint] = OwnerRankings()
        self.by_heat: OwnerRankings[Checkpoint] = OwnerRankings()

    def add(self, checkpoint: Checkpoint) -> None:
        """`last_above` gave what lies above it; none lies at its place."""
        node, tail, above = checkpoint.node, checkpoint.tail, checkpoint.above
        siblings = self.tops.setdefault(node.salt, {}) if above is None else above.below
        if not node.is_bare:
            lower = _next_below(checkpoint, most=4 * len(siblings) + 64)
            if lower is None:
                lower = [other for other in siblings if other.is_below(checkpoint)]
            self._hang(lower, checkpoint)
            for other in lower:
                del siblings[other]
        siblings[checkpoint] = None
        self.by_slot[checkpoint.slot] = node.checkpoints[tail] = checkpoint
        node.note_way(tail)
        self._rank(checkpoint)
        if above is not None:
            self._rank(above)

    def remove(self, checkpoint: Checkpoint) -> None:
        """It leaves its heat to the one above."""
        node, above = checkpoint.node, checkpoint.above
        del self.by_slot[checkpoint.slot], node.checkpoints[checkpoint.tail]
        node.forget_way(checkpoint.tail)
        self.by_benefit.discard(checkpoint)
        self.by_heat.discard(checkpoint)
        siblings = self.tops[node.salt] if above is None else above.below
        del siblings[checkpoint]
        self._hang(checkpoint.below, above)
        if above is not None:
            above.heat = add_heat(above.heat, checkpoint.heat)
            self._rank(above)
        elif not siblings:
            del self.tops[node.salt]

    def _hang(self, lower: Iterable[Checkpoint], above: Checkpoint | None) -> None:
        """Make `above` what lies above these."""
        for other in lower:
            other.above = above
            if above is not None:
                above.below[other] = None
            else:
                self.tops.setdefault(other.node.salt, {})[other] = None
            self._rank(other)

    def count_hit(self, hit: Checkpoint, now: float) -> None:
        """A request goes on from there."""
        hit.heat = now + FIRST_HIT if hit.num_hits == 0 else add_heat(hit.heat, now)
        hit.num_hits += 1
        self._rank(hit)

    def _rank(self, checkpoint: Checkpoint) -> None:
        self.by_benefit.rank(checkpoint, log2(checkpoint.distance) + checkpoint.heat)
        self.by_heat.rank(checkpoint, (bool(checkpoint.below), checkpoint.heat))

    def coldest_first(self) -> list[Checkpoint]:
        return sorted(self.by_slot.values(), key=lambda c: (c.heat, c.num_tokens))

    def clear(self) -> None:
        for held in (self.by_slot, self.tops, self.by_benefit, self.by_heat):
            held.clear()


def last_above(node: Node, tail: Tokens) -> Checkpoint | None:
    """The last checkpoint before the end of `tail` on the path to `node` and on."""
    found = last_on_way(node, tail[:-1] if tail else None, None)
    while found is None and node.parent is not None:
        node, key = node.parent, node.key
        found = last_on_way(node, key, None) if node.checkpoints else None
    return found


def _next_below(checkpoint: Checkpoint, *, most: int) -> list[Checkpoint] | None:
    """Those that will have a new checkpoint above them, found from its node down; None after `most` nodes."""
    node, tail, above = checkpoint.node, checkpoint.tail, checkpoint.above
    lower = [c for way, c in node.checkpoints.items() if len(way) > len(tail) and way[: len(tail)] == tail]
    nodes = [child for key, child in node.children.items() if key[: len(tail)] == tail]
    while nodes:
        most -= 1
        if most < len(nodes):
            return None
        node = nodes.pop()
        lower += node.checkpoints.values()
        if () not in node.checkpoints:
            nodes += node.children.values()
    return [other for other in lower if other.above is above]
