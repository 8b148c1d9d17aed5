"""The data that flows through a model: packed tokens of several sequences and, when serving, a view of their caches.

Legend: T tokens, N sequences, M pages of a sequence, P tokens in a page, G KV heads, K head dim, W conv width, C conv
channels, H value heads, V value head dim, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qnext.ops import AttentionCache, DeltaCache, Packing, PendingTokens, put_rows


class KVPages(NamedTuple):
    """Keys and values of one full-attention layer, each [num_pages, G, P, K].

    In int8 they are codes, and there are scales [num_pages, G, P] in fp32, one per token and KV head.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]


class RoutingPages(NamedTuple):
    """The experts of the tokens of one layer: where routers write them, in the order of their weights."""

    table_NA: Tensor  # int64 [num_pages * P, top_k]
    write_index_T: Tensor

    def write(self, experts_TA: Tensor) -> None:
        put_rows(experts_TA.view(torch.float32), self.write_index_T, self.table_NA.view(torch.float32))


class KeepsRouting(Protocol):
    """Is told which experts a router chose."""

    def write(self, experts_TA: Tensor) -> None: ...


class CountedRouting(NamedTuple):
    """Counts the experts of some tokens, and writes the choice for all where `pages` keep it."""

    load_E: Tensor
    is_counted_P: Tensor  # int64 [T * top_k]: 1, or 0 for a token that is nobody's
    pages: RoutingPages | None

    def write(self, experts_TA: Tensor) -> None:
        self.load_E.index_add_(0, experts_TA.flatten(), self.is_counted_P)
        if self.pages is not None:
            self.pages.write(experts_TA)


class DeltaSlots(NamedTuple):
    """The state of one Gated DeltaNet layer, one slot per sequence."""

    conv: Tensor  # [num_slots, W - 1, C] last inputs of the convolution, oldest first, fp32
    state: Tensor  # [num_slots, H, K, V] fp32 or bf16
    pending: PendingTokens | None = None  # what drafts computed, where the cache allows them

    @property
    def tensors(self) -> list[Tensor]:
        return [self.conv, self.state, *(self.pending or ())]


@dataclass(frozen=True)
class CacheView:
    """Where one step reads, writes and counts. Layers are numbered as in the trunk; the MTP layer follows.

    A sequence with `is_fresh_N` true starts in this step: the old content of its slot is never read. The tokens of a
    sequence with `is_draft_N` true may be rejected. They do not change its recurrent states, and the keys and values of
    rejected tokens are overwritten before anything reads them.
    """

    kv: Mapping[int, KVPages]
    delta: Mapping[int, DeltaSlots]
    slots_N: Tensor  # int64
    is_fresh_N: Tensor  # bool
    block_tables_NM: Tensor  # int64 page numbers in order, padded with any valid page
    context_lengths_N: Tensor  # int64 on the CPU: tokens of each sequence, this step included
    write_index_T: Tensor  # int64 page * P + offset for every token of the step
    has_fresh: bool = True  # whether any of is_fresh_N may be true; false saves a pass over the states
    is_draft_N: Tensor | None = None  # bool; None where nothing is a draft
    prompt_lengths_N: Tensor | None = None  # int64 on the CPU, for states in bf16; None: no token is behind a prompt
    expert_load: Mapping[int, Tensor] = field(default_factory=dict)  # int64 [E] of a layer: routers add their tokens
    routing: Mapping[int, Tensor] = field(default_factory=dict)  # int64 [num_pages, 1, P, top_k]: RoutingPages
    lengths_there_N: Tensor | None = None  # context_lengths_N on the device, for attention; None: they are on the CPU
    host_lengths: tuple[int, ...] | None = None  # see AttentionCache
    is_counted_P: Tensor | None = None  # int64 [T * top_k]: 0 where a token counts for no expert; None: all count

    def delta_cache(self, layer_index: int) -> DeltaCache:
        """The slots of one layer, with the slot numbers of the step's sequences."""
        slots = self.delta[layer_index]
        return DeltaCache(
            slots.conv,
            slots.state,
            self.slots_N,
            self.is_fresh_N,
            has_fresh=self.has_fresh,
            pending=slots.pending,
            is_draft_N=self.is_draft_N,
            context_lengths_N=self.context_lengths_N,
            prompt_lengths_N=self.prompt_lengths_N,
        )

    def attention_cache(self, layer_index: int) -> AttentionCache:
        """What the attention of one layer reads and writes."""
        pages = self.kv[layer_index]
        lengths_N = self.context_lengths_N if self.lengths_there_N is None else self.lengths_there_N
        return AttentionCache(*pages, self.block_tables_NM, lengths_N, self.write_index_T, self.host_lengths)

    def load_of(self, layer_index: int) -> Tensor | None:
        """Where the router of one layer counts all its tokens; None where it counts none, or some."""
        return self.expert_load.get(layer_index) if self.is_counted_P is None else None

    def kept_routing(self, layer_index: int) -> KeepsRouting | None:
        """Where the router of one layer writes its choice; None where nothing keeps it."""
        table, load_E = self.routing.get(layer_index), self.expert_load.get(layer_index)
        pages = None if table is None else RoutingPages(table.flatten(0, 2), self.write_index_T)
        if self.is_counted_P is None or load_E is None:
            return pages
        return CountedRouting(load_E, self.is_counted_P, pages)


@dataclass(frozen=True)
class Batch:
    """Packed tokens [T]. The same type trains (cache None) and serves. There is no padding.

    `routing` replays the choice of routers, int64 [T, top_k] of a layer: see ops.route.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    packing: Packing
    cache: CacheView | None = None
    routing: Mapping[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def from_lengths(token_ids_T: Tensor, lengths: Sequence[int]) -> Batch:
        """Whole sequences that start at position zero, without a cache."""
        packing = Packing(lengths, device=token_ids_T.device)
        assert packing.num_tokens == token_ids_T.shape[0]
        return Batch(token_ids_T, packing.offsets_T, packing)
