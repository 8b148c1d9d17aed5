"""What is cached of which prefixes, and the shares in both pools. Integers only, no torch.

A node of the trie is a full block of tokens, its key the exact tokens in it (never a hash of them), and every `salt`
has a root of its own. A checkpoint hangs on the node of the last full block before it. What a request holds never goes;
docs/hybrid-cache.md ("What is evicted first") tells in which order all else does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.prefix_checkpoints import Checkpoints, last_above
from qnext.engine.policy.prefix_node import Checkpoint, Node, Spill, Tokens, add_heat, path_to, spill_of
from qnext.engine.policy.ranking import OwnerRankings, take_in_turn


class Evicted(NamedTuple):
    """Ids that went back to their pools."""

    blocks: list[int]
    slots: list[int]


class PrefixTrie:
    """The trie and its shares in both pools. `now` is the heat of one use at that moment."""

    def __init__(
        self,
        *,
        block_size: int,
        blocks: RefPool | None,
        slots: RefPool | None,
        spill_blocks: int = 0,
    ) -> None:
        """With `spill_blocks`, what is evicted is noted in `spills`: every checkpoint, or without states every path of
        so many blocks or a multiple."""
        self.block_size = block_size
        self.spill_blocks = spill_blocks
        self.spills: list[Spill] = []
        self.blocks = blocks
        self.slots = slots
        self.roots: dict[str, Node] = {}
        self.checkpoints = Checkpoints()
        self.bare: OwnerRankings[Node] = OwnerRankings()  # nothing below and no checkpoint
        self._num_changes = 0
        self._last_walk: tuple[int, Tokens, str, list[Node]] = (-1, (), "", [])

    def walk(self, tokens: Tokens, *, salt: str, limit: int) -> list[Node]:
        """The root and the nodes of the first full blocks of `tokens`, as far as they are there; [] without a root.

        An admission asks for the same walk several times: the last one is kept until something changes.
        """
        assert limit <= len(tokens)
        num_changes, walked, walked_salt, path = self._last_walk
        if num_changes != self._num_changes or walked is not tokens or walked_salt != salt:
            path = self._walk(tokens, salt)
            self._last_walk = (self._num_changes, tokens, salt, path)
        return path[: limit // self.block_size + 1]

    def _walk(self, tokens: Tokens, salt: str) -> list[Node]:
        node = self.roots.get(salt)
        path: list[Node] = []
        size = self.block_size
        for end in range(size, len(tokens) + size + 1, size):
            if node is None:
                break
            path.append(node)
            node = node.children.get(tokens[end - size : end]) if end <= len(tokens) else None
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
        return start + path[-1].num_shared(tokens[start : start + self.block_size])

    def extend(
        self,
        tokens: Tokens,
        blocks: Sequence[int],
        *,
        salt: str,
        owner: str,
        now: float,
        end: int,
        start: Node | None = None,
    ) -> Node:
        """Make the nodes of all full blocks of `tokens[:end]` that are missing; returns the last one.

        `start` is a node on the way, if one is known, from which to go on.
        """
        assert self.blocks is None or len(blocks) * self.block_size >= end, "tokens without blocks"
        if salt not in self.roots:
            self.roots[salt] = Node(salt, owner, (), None, 0, None, now)
        node = start if start is not None and not start.is_gone else self.roots[salt]
        for index in range(node.depth, end // self.block_size):
            key = tokens[index * self.block_size : (index + 1) * self.block_size]
            child = node.children.get(key)
            if child is None:
                child = self._add_node(node, key, blocks[index] if self.blocks is not None else None, now)
            node = child
        return node

    def _add_node(self, parent: Node, key: Tokens, block: int | None, now: float) -> Node:
        node = parent.children[key] = Node(parent.salt, parent.owner, key, parent, parent.depth + 1, block, now)
        parent.note_way(key)
        self._share_block(block)
        self.bare.discard(parent)
        self._settle(node)
        self._num_changes += 1
        return node

    def add_checkpoint(
        self, node: Node, tail: Tokens, *, slot: int, tail_block: int | None, is_shared: bool, now: float
    ) -> bool:
        """Share a slot with the state after the path to `node` and `tail`. False if one lies there already."""
        assert self.slots is not None and slot not in self.checkpoints.by_slot
        known = node.checkpoints.get(tail)
        if known is not None:
            known.num_hits = max(known.num_hits, int(is_shared))
            return False
        num_tokens, above = node.depth * self.block_size + len(tail), last_above(node, tail)
        self.checkpoints.add(Checkpoint(node, tail, num_tokens, slot, tail_block, above, now, int(is_shared)))
        self.slots.keep(slot)
        self._share_block(tail_block)
        self.bare.discard(node)
        return True

    def warm(self, node: Node, now: float) -> None:
        """A request goes on behind this block, where there are no checkpoints."""
        node.heat = add_heat(node.heat, now)
        if node in self.bare:
            self._settle(node)

    def evict(self, *, num_blocks: int, num_slots: int, owner: str, exposed: Collection[str] | None) -> Evicted:
        """Give back so many blocks and slots, or a few more; nothing at all where that much is surely not to be had.

        `owner` needs them; see `take_in_turn` for whose they are.
        """
        evicted = Evicted([], [])
        for pool, count in ((self.blocks, num_blocks), (self.slots, num_slots)):
            if count and (pool is None or count > pool.num_in_reach(owner, exposed)):
                return evicted
        if num_blocks and self.blocks is not None:
            take_in_turn(
                self.blocks.holdings,
                lambda other, until: self._evict_blocks(other, until, evicted),
                is_enough=lambda: len(evicted.blocks) >= num_blocks,
                owner=owner,
                exposed=exposed,
            )
        if num_slots and self.slots is not None:
            take_in_turn(
                self.slots.holdings,
                lambda other, until: self._evict_slots(other, until, evicted),
                is_enough=lambda: len(evicted.slots) >= num_slots,
                owner=owner,
                exposed=exposed,
            )
        return evicted

    def _evict_slots(self, owner: str, until: Callable[[], bool], evicted: Evicted) -> None:
        self.checkpoints.by_benefit.remove_until(
            until,
            owner=owner,
            is_usable=self._is_slot_loose,
            remove=lambda checkpoint: self._remove_checkpoint(checkpoint, evicted),
        )

    def _evict_blocks(self, owner: str, until: Callable[[], bool], evicted: Evicted) -> None:
        self.bare.remove_until(
            until,
            owner=owner,
            is_usable=lambda node: not self._is_pinned(node.block),
            remove=lambda node: self._remove_cold(node, until, evicted),
        )
        # A checkpoint that others lie below comes last: only the block of its last tokens is to be had.
        self.checkpoints.by_heat.remove_until(
            until,
            owner=owner,
            is_usable=lambda checkpoint: self._is_slot_loose(checkpoint) and self._keeps_blocks(checkpoint),
            remove=lambda checkpoint: self._remove_checkpoint(checkpoint, evicted),
        )

    def _keeps_blocks(self, checkpoint: Checkpoint) -> bool:
        """Whether blocks are there only for this checkpoint, or for it and others behind the same node."""
        node, tail_block = checkpoint.node, checkpoint.tail_block
        if tail_block is not None and not self._is_pinned(tail_block):
            return all(child.block != tail_block for child in node.children.values())
        return not node.children and len(node.checkpoints) == 1 and not self._is_pinned(node.block)

    def _is_pinned(self, block: int | None) -> bool:
        """Whether somebody else holds the block."""
        return block is not None and self.blocks is not None and not self.blocks.is_loose(block)

    def _is_slot_loose(self, checkpoint: Checkpoint) -> bool:
        assert self.slots is not None
        return self.slots.is_loose(checkpoint.slot)

    def _share_block(self, block: int | None) -> None:
        if block is not None and self.blocks is not None:
            self.blocks.keep(block)

    def _free_block(self, block: int | None, evicted: Evicted) -> None:
        if block is not None and self.blocks is not None and self.blocks.drop(block):
            evicted.blocks.append(block)

    def everything(self) -> list[Spill]:
        """All that eviction would note, what is worth most last."""
        if self.slots is not None:
            return [spill_of(checkpoint) for checkpoint in self.checkpoints.coldest_first()]
        nodes, found = list(self.roots.values()), []
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if self._is_spilled(node):
                found.append(node)
        return [path_to(node) for node in sorted(found, key=lambda node: (node.heat, node.depth))]

    def _is_spilled(self, node: Node) -> bool:
        """Whether a node of a model without states is one at which a path is kept."""
        return bool(self.spill_blocks and self.slots is None and node.depth and node.depth % self.spill_blocks == 0)

    def clear(self) -> None:
        """Let go of everything, pinned or not."""
        for pool in (self.blocks, self.slots):
            if pool is not None:
                for index in list(pool.kept()):
                    pool.drop(index)
        for held in (self.roots, self.checkpoints, self.bare, self.spills):
            held.clear()
        self._num_changes += 1

    def forget(self, slot: int) -> None:
        """Remove the checkpoint in this slot, pinned or not, and all blocks that nothing needs then. It is no spill."""
        num_spills = len(self.spills)
        self._remove_checkpoint(self.checkpoints.by_slot[slot], Evicted([], []))
        del self.spills[num_spills:]

    def _remove_checkpoint(self, checkpoint: Checkpoint, evicted: Evicted) -> None:
        """Together with all blocks that nothing needs then."""
        assert self.slots is not None
        node = checkpoint.node
        if self.spill_blocks:
            self.spills.append(spill_of(checkpoint))
        self.checkpoints.remove(checkpoint)
        if self.slots.drop(checkpoint.slot):
            evicted.slots.append(checkpoint.slot)
        self._free_block(checkpoint.tail_block, evicted)
        if node.is_bare:
            self._settle(node)
            self._prune(node, evicted)

    def _prune(self, node: Node, evicted: Evicted) -> None:
        """Remove a bare node and those above that it leaves bare, as far as nobody holds them."""
        while node in self.bare and not self._is_pinned(node.block):
            node = self._remove_leaf(node, evicted)

    def _remove_cold(self, node: Node, is_enough: Callable[[], bool], evicted: Evicted) -> None:
        """Remove a bare node, and those above that it leaves bare while they are no warmer, until it is enough."""
        heat = node.heat
        while True:
            node = self._remove_leaf(node, evicted)
            if is_enough() or node not in self.bare or node.heat > heat or self._is_pinned(node.block):
                return

    def _remove_leaf(self, node: Node, evicted: Evicted) -> Node:
        """Remove a bare node; returns its parent."""
        assert node.is_bare and node.parent is not None
        if self._is_spilled(node):
            self.spills.append(path_to(node))
        self.bare.discard(node)
        del node.parent.children[node.key]
        node.parent.forget_way(node.key)
        node.is_gone = True
        self._num_changes += 1
        self._free_block(node.block, evicted)
        if node.parent.is_bare:
            self._settle(node.parent)
        return node.parent

    def _settle(self, node: Node) -> None:
        """A node is bare: note it. A bare root goes at once."""
        if node.parent is None:
            del self.roots[node.salt]
            node.is_gone = True
            self._num_changes += 1
        else:
            self.bare.rank(node, node.heat if self.slots is None else 0.0)
