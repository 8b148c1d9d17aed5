"""Whether all that is known of cached prefixes hangs together. No torch."""

from __future__ import annotations

from collections import Counter
from math import log2

from qnext.engine.policy.prefix_checkpoints import Checkpoints
from qnext.engine.policy.prefix_node import Checkpoint, Node, last_on_way
from qnext.engine.policy.prefix_trie import PrefixTrie


def check_trie(trie: PrefixTrie) -> None:
    """The trie hangs together, and its shares are exactly what its nodes and checkpoints name."""
    shares: Counter[int] = Counter()
    checkpoints: dict[int, Checkpoint] = {}
    bare: set[Node] = set()
    for salt, root in trie.roots.items():
        assert root.parent is None and root.depth == 0 and root.block is None and not root.is_bare
        nodes: list[tuple[Node, Checkpoint | None]] = [(root, None)]
        while nodes:
            node, above = nodes.pop()
            assert (
                (node.salt, node.owner) == (salt, root.owner)
                and (node is root or len(node.key) == trie.block_size)
                and not node.is_gone
            )
            assert node.ways is None or node.ways == sorted([*node.children, *node.checkpoints])
            assert (node.block is None) == (trie.blocks is None or node is root)
            shares.update([] if node.block is None else [node.block])
            for tail, checkpoint in node.checkpoints.items():
                assert checkpoint.node is node and checkpoint.tail == tail and len(tail) < trie.block_size
                assert checkpoint.num_tokens == node.depth * trie.block_size + len(tail) > 0
                assert checkpoint.above is last_on_way(node, tail[:-1] if tail else None, above)
                assert (checkpoint.tail_block is None) == (trie.blocks is None or not tail)
                shares.update([] if checkpoint.tail_block is None else [checkpoint.tail_block])
                assert checkpoint.slot not in checkpoints
                checkpoints[checkpoint.slot] = checkpoint
            if node.is_bare:
                bare.add(node)
            for key, child in node.children.items():
                assert child.parent is node and child.key == key and child.depth == node.depth + 1
                nodes.append((child, last_on_way(node, key, above)))
    assert bare == set(trie.bare) and checkpoints == trie.checkpoints.by_slot
    assert shares == Counter(trie.blocks.kept() if trie.blocks is not None else ())
    assert Counter(checkpoints.keys()) == Counter(trie.slots.kept() if trie.slots is not None else ())
    _check_orders(trie.checkpoints)


def _check_orders(known: Checkpoints) -> None:
    """What is kept beside the trie to find things fast says what the trie says."""
    checkpoints = list(known.by_slot.values())
    tops = {c for siblings in known.tops.values() for c in siblings}
    assert tops == {c for c in checkpoints if c.above is None}
    assert all(c.above is None or c in c.above.below for c in checkpoints)
    assert sum(len(c.below) for c in checkpoints) == len(checkpoints) - len(tops)
    for checkpoint in checkpoints:
        wanted = (log2(checkpoint.distance) + checkpoint.heat, (bool(checkpoint.below), checkpoint.heat))
        assert (known.by_benefit.key(checkpoint), known.by_heat.key(checkpoint)) == wanted
    assert set(known.by_heat) == set(known.by_benefit) == set(checkpoints)
