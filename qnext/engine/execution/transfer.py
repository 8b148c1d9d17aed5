"""Blocks and slots of a cache as named tensors, and back.

An entry's tensors have the names of the cache's: `kv.<layer>.<n>`, `routing.<layer>` and `delta.<layer>.<n>`, for
whatever layers it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qnext.engine.execution.cache import Cache


def pages_of(cache: Cache) -> dict[str, Tensor]:
    """All tensors that have blocks, the third axis being the tokens of a block."""
    kv = {f"kv.{layer}.{n}": t for layer, pages in cache.kv.items() for n, t in enumerate(pages.tensors)}
    return kv | {f"routing.{layer}": pages for layer, pages in cache.routing.items()}


def states_of(cache: Cache) -> dict[str, Tensor]:
    """All tensors that have slots; what drafts left pending is no part of them."""
    return {
        f"delta.{layer}.{n}": tensor
        for layer, slots in cache.delta.items()
        for n, tensor in enumerate(slots)
        if isinstance(tensor, Tensor)
    }


@torch.inference_mode()
def read_blocks(cache: Cache, blocks: Sequence[int], *, num_tokens: int) -> dict[str, Tensor]:
    """A copy of the first `num_tokens` tokens of these blocks, as many as that takes.

    The places behind them are zero: they may hold what another wrote.
    """
    index = torch.tensor(blocks[: -(-num_tokens // cache.block_size)], dtype=torch.long, device=cache.device)
    rest = num_tokens % cache.block_size
    found = {}
    for name, pages in pages_of(cache).items():
        found[name] = pages[index]
        if rest:
            found[name][-1, :, rest:] = 0
    return found


@torch.inference_mode()
def read_slot(cache: Cache, slot: int) -> dict[str, Tensor]:
    """The state in a slot, accepted drafts included: views, to be copied before the next step."""
    cache.flush([slot])
    return {name: states[slot] for name, states in states_of(cache).items()}


@torch.inference_mode()
def write_blocks(
    cache: Cache, blocks: Sequence[int], tensors: Mapping[str, Tensor], *, start: int, num_tokens: int
) -> None:
    """What `read_blocks` gave for `num_tokens` tokens, from its block number `start` on, to these blocks."""
    index = torch.tensor(blocks, dtype=torch.long, device=cache.device)
    rest = num_tokens % cache.block_size
    is_last_here = start + len(blocks) == -(-num_tokens // cache.block_size)
    for name, pages in pages_of(cache).items():
        pages[index] = tensors[name][start : start + len(blocks)].to(cache.device, non_blocking=True)
        if cache.poison and rest and is_last_here and pages.is_floating_point():
            pages[blocks[-1], :, rest:] = float("nan")


@torch.inference_mode()
def write_slot(cache: Cache, slot: int, tensors: Mapping[str, Tensor]) -> None:
    cache.commit(slot, 0)  # nothing is pending on what is written
    for name, states in states_of(cache).items():
        states[slot].copy_(tensors[name], non_blocking=True)


def block_bytes(cache: Cache) -> int:
    return sum(pages[0].nbytes for pages in pages_of(cache).values())


def slot_bytes(cache: Cache) -> int:
    return sum(states[0].nbytes for states in states_of(cache).values())


def has_shape_of(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, num_blocks: int | None) -> bool:
    """Whether an entry has all tensors of the cache, for so many blocks, or for a slot where that is None."""
    lead = () if num_blocks is None else (num_blocks,)
    return all(
        name in tensors and tensors[name].dtype == tensor.dtype and tensors[name].shape == (*lead, *tensor.shape[1:])
        for name, tensor in wanted.items()
    )
