"""Copies of what the sequences of a call carry, on which a mixer can be computed once more.

Legend: T tokens, N sequences, M pages of a sequence, P tokens in a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.ops import AttentionCache, DeltaCache, Packing, PendingTokens


def copy_slots(cache: DeltaCache) -> DeltaCache:
    """The slots of the call's sequences, in their order."""
    slots_N = cache.slots_N
    pending = cache.pending
    return cache._replace(
        conv=cache.conv.index_select(0, slots_N),
        state=cache.state.index_select(0, slots_N),
        slots_N=torch.arange(len(slots_N), device=slots_N.device),
        pending=None if pending is None else PendingTokens(*(x.index_select(0, slots_N) for x in pending)),
    )


def put_slots(copy: DeltaCache, cache: DeltaCache, sequences_S: Tensor) -> None:
    """The slots of these sequences of the call become those of the copy."""
    slots_S = cache.slots_N.index_select(0, sequences_S)
    pairs = [(copy.conv, cache.conv), (copy.state, cache.state)]
    if copy.pending is not None and cache.pending is not None:
        pairs += list(zip(copy.pending, cache.pending, strict=True))
    for source, target in pairs:
        target.index_copy_(0, slots_S, source.index_select(0, sequences_S))


def copy_pages(cache: AttentionCache, packing: Packing) -> AttentionCache:
    """The pages of the call's sequences, one sequence after another."""
    size = cache.k_pages.shape[2]
    width = -(-int(cache.context_lengths_N.max()) // size)
    tables_NM = cache.block_tables_NM[:, :width]
    used = tables_NM.flatten()
    pages = [None if x is None else x.index_select(0, used) for x in cache[:4]]
    assert pages[0] is not None and pages[1] is not None
    lengths_N, contexts_N = packing.lengths_N, cache.context_lengths_N.to(packing.device)
    places_T = packing.offsets_T + (contexts_N - lengths_N)[packing.sequence_ids_T]
    first_T = packing.sequence_ids_T * width
    return AttentionCache(
        pages[0],
        pages[1],
        pages[2],
        pages[3],
        torch.arange(tables_NM.numel(), device=used.device).view(tables_NM.shape),
        cache.context_lengths_N,
        (first_T + places_T // size) * size + places_T % size,
    )


def put_pages(copy: AttentionCache, cache: AttentionCache, rows_R: Tensor) -> None:
    """The keys and values of these tokens of the call become those of the copy."""
    size = cache.k_pages.shape[2]
    from_R, to_R = copy.write_index_T[rows_R], cache.write_index_T[rows_R]
    for source, target in zip(copy[:4], cache[:4], strict=True):
        if source is not None and target is not None:
            target[to_R // size, :, to_R % size] = source[from_R // size, :, from_R % size]


def context_of(pages: Tensor, scales: Tensor | None, table_M: Tensor, context: int) -> Tensor:
    """[S, G, K]: keys or values of one sequence, as they are stored."""
    rows = pages.index_select(0, table_M)
    wide = rows if scales is None else rows.float() * scales.index_select(0, table_M)[..., None]
    return wide.transpose(1, 2).flatten(0, 1)[:context]
