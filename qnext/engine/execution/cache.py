"""The memory of a running engine: pages of keys and values, slots of recurrent state.

Legend: N sequences of a step, T tokens of a step, M pages of a sequence, P tokens in a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from qnext.engine.policy.step import Rows, StepPlan
from qnext.model import DeltaSlots, KVPages
from qnext.ops import DELTA_CHUNK_SIZE, PendingTokens, apply_pending, backend_of, empty_huge, touch

BLOCK_SIZE = 16
STATE_DTYPES = (torch.float32, torch.bfloat16)
# Of the MTP layer, in each slot: the positions whose rows of the trunk it reads, and the pages of its keys and values.
NUM_SOURCES, NUM_DRAFT_PAGES = 64, 32


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """How much a cache holds."""

    num_blocks: int
    num_slots: int
    max_model_len: int
    """Tokens of a sequence at most: the width of the page tables."""

    block_size: int = BLOCK_SIZE
    """Tokens of a page."""

    num_draft_tokens: int = 0
    """Tokens of a sequence that a step may compute before it is known how many of them it keeps: see `Cache.commit`."""

    has_drafter: bool = False
    """Each slot has what the MTP layer needs (`sources`, `draft_kv`)."""

    keeps_routing: bool = False
    """Blocks have the experts of their tokens (`routing`), so that cached prefixes have them."""

    has_spare: bool = False
    """One slot and one block more, the last, are nobody's: rows that fill up a batch are there (`rows_of_nobody`)."""


@dataclass(frozen=True, kw_only=True)
class CacheDtypes:
    """In which types a cache keeps what it holds. Inputs of the convolution are fp32 always: native activations have
    that width whatever the weights are."""

    activations: torch.dtype
    """Of the model: of the rows that drafts read, where the backend has no width of its own."""

    kv: torch.dtype
    """Of keys and values; in int8 they have an fp32 scale per token and head."""

    states: torch.dtype = torch.float32
    """Of recurrent states: fp32, or bf16 for half the memory, rounded where DeltaCache says."""


class Cache:
    """Pages for every full-attention layer and slots for every linear layer of the trunk.

    For drafts, `sources` has the rows of the trunk that the MTP layer reads, that of position p at place p modulo
    NUM_SOURCES, and `draft_kv`, under the number of the layer after the last, its own pages, which go round as well.
    Neither is shared or copied. `routing` has the experts of the tokens in a block, int64 [num_blocks, 1, P, top_k] of
    each sparse layer. With `poison`, memory that has no owner is filled with NaN, so that reading it shows (for tests).
    `expert_load` has the counters of the views.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: CacheSizes,
        dtypes: CacheDtypes,
        *,
        device: torch.device | str = "cpu",
        expert_load: Mapping[int, Tensor] | None = None,
        poison: bool = False,
    ) -> None:
        self.state_dtype = dtypes.states
        self.expert_load = expert_load or {}
        self.block_size = block_size = sizes.block_size
        self.poison = poison
        self.num_draft_tokens = sizes.num_draft_tokens
        self.device = torch.device(device)
        self.spare_slot = sizes.num_slots if sizes.has_spare else None
        num_slots, num_blocks = sizes.num_slots + sizes.has_spare, sizes.num_blocks + sizes.has_spare
        self.num_chosen = config.num_experts_per_tok if config.num_experts else 0  # experts of a token
        kinds = list(enumerate(config.layer_types))
        source_dtype = backend_of(self.device).activation_dtype or dtypes.activations
        source_shape = (num_slots if sizes.has_drafter else 0, NUM_SOURCES, config.hidden_size)
        self.sources = torch.zeros(source_shape, dtype=source_dtype, device=self.device)
        kv_shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self.kv = {
            index: _make_pages(kv_shape, dtypes.kv, self.device) for index, kind in kinds if kind == FULL_ATTENTION
        }
        self.routing: dict[int, Tensor] = {}
        if sizes.keeps_routing:
            shape = (num_blocks, 1, block_size, config.num_experts_per_tok)
            sparse = [index for index in range(len(kinds)) if config.is_moe_layer(index)]
            self.routing = {index: torch.zeros(shape, dtype=torch.long, device=self.device) for index in sparse}
        self.draft_kv: dict[int, KVPages] = {}
        if sizes.has_drafter:
            draft_shape = (num_slots * NUM_DRAFT_PAGES, *kv_shape[1:])
            self.draft_kv[config.num_hidden_layers] = _make_pages(draft_shape, dtypes.kv, self.device)
        linear = [index for index, kind in kinds if kind == LINEAR_ATTENTION]
        self._num_accepted = torch.zeros(len(linear), num_slots, dtype=torch.long, device=device)
        self._accepted_on_host = self._num_accepted.numpy() if self.device.type == "cpu" else None
        self.delta = {
            index: _make_slots(config, sizes.num_draft_tokens, accepted, dtypes.states)
            for index, accepted in zip(linear, self._num_accepted.unbind(), strict=True)
        }
        # One row of page numbers per slot: a step selects rows instead of copying whole tables from Python.
        self.max_pages = max(1, -(-sizes.max_model_len // block_size)) if self.kv else 1
        self._tables = torch.zeros(num_slots, self.max_pages, dtype=torch.long, device=device)
        # What places are computed from. The device has the same, for kernels.
        is_here = self.device.type == "cpu"
        self._tables_on_host = (self._tables if is_here else torch.zeros(self._tables.shape, dtype=torch.long)).numpy()
        self._table_length = [0] * num_slots
        self.adapters = np.zeros(num_slots, dtype=np.int64)  # of the sequence in each slot; 0: none
        # Memory that nobody wrote is only promised: it could run out in the middle of a step.
        states = [tensor for layer in self.delta.values() for tensor in layer.tensors]
        touch([self._tables, *self._paged, *states, *self._of_drafter])
        if poison:
            self._fill(range(sizes.num_blocks), range(sizes.num_slots), float("nan"))
        if self.spare_slot is not None:
            self._fill([sizes.num_blocks], [self.spare_slot], 0.0)
            self._bind(self.spare_slot, 0, [sizes.num_blocks])

    @property
    def kv_bytes(self) -> int:
        """Bytes that the pages of all layers occupy."""
        return sum(tensor.nbytes for tensor in self._paged)

    @property
    def _paged(self) -> list[Tensor]:
        """All that has blocks."""
        return [*(tensor for pages in self.kv.values() for tensor in pages.tensors), *self.routing.values()]

    @property
    def state_bytes(self) -> int:
        """Bytes that the slots of all layers occupy."""
        states = [tensor for slots in self.delta.values() for tensor in slots.tensors]
        return sum(tensor.nbytes for tensor in (*states, *self._of_drafter))

    @property
    def _of_drafter(self) -> list[Tensor]:
        return [self.sources, *(tensor for pages in self.draft_kv.values() for tensor in pages.tensors)]

    @overload
    def place_of_source(self, slot: int, position: int) -> int: ...

    @overload
    def place_of_source(self, slot: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def place_of_source(self, slot: Any, position: Any) -> Any:
        """Row of `sources`, its first two dimensions as one, for a position of the sequence in a slot."""
        return slot * NUM_SOURCES + position % NUM_SOURCES

    def forget(self, plan: StepPlan) -> None:
        """What was freed before a step: who comes there writes anew. `poison` overwrites it."""
        for slot in plan.freed_slots:
            self._table_length[slot] = 0
        if self.poison:
            self._fill(plan.freed_blocks, plan.freed_slots, float("nan"))

    def prepare(self, plan: StepPlan) -> None:
        """Before the tokens of a step: make copies, and write down which blocks the sequences got."""
        for source, target in plan.block_copies:
            for tensor in self._paged:
                tensor[target].copy_(tensor[source])
        for source, target in plan.slot_copies:  # one by one: the target of one may be the source of the next
            self.copy_slots([source], [target])
        for sequence in plan.sequences:
            self.adapters[sequence.slot] = sequence.adapter
            if sequence.blocks:
                self._bind(sequence.slot, sequence.first_block, sequence.blocks)

    def commit(self, slot: int, num_accepted: int) -> None:
        """The first `num_accepted` tokens of the slot's last step, a draft, belong to its sequence, the others do not.

        Costs one small write: the next step of the sequence, or `flush`, applies them. Until then they count as zero.
        """
        if not 0 <= num_accepted <= self.num_draft_tokens:
            raise ValueError(f"{num_accepted} accepted tokens of a draft of at most {self.num_draft_tokens}")
        if self._accepted_on_host is not None:
            self._accepted_on_host[:, slot] = num_accepted  # a tenth of the time that torch takes
        else:
            self._num_accepted[:, slot] = num_accepted

    def flush(self, slots: Sequence[int]) -> None:
        """Bring the states of these slots, all different, up to what was committed: before they are read or copied."""
        if not self.num_draft_tokens or not slots:
            return
        slots_N = torch.tensor(list(slots), dtype=torch.long, device=self.device)
        for conv, state, pending in self.delta.values():
            if pending is not None:
                apply_pending(conv, state, pending, slots_N)

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Recurrent states of `sources` to `targets`, one after another. Pages are not copied."""
        self.flush(sorted(set(sources)))
        for layer in self.delta.values():
            for source, target in zip(sources, targets, strict=True):
                layer.conv[target].copy_(layer.conv[source])
                layer.state[target].copy_(layer.state[source])
        self._num_accepted[:, list(targets)] = 0

    def _bind(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """The sequence in a slot goes on with these blocks, from its block number `first` on."""
        known, count = self._table_length[slot], first + len(blocks)
        assert known == first, f"slot {slot} has {known} blocks and gets block number {first}"
        self._tables_on_host[slot, first:count] = blocks
        if self.device.type != "cpu":
            self._tables[slot, first:count] = torch.tensor(blocks, dtype=torch.long).to(self.device)
        self._table_length[slot] = count

    def tables(self) -> NDArray[np.int64]:
        """Page numbers of the sequence in each slot, as far as it is bound."""
        return self._tables_on_host

    def tables_of(self, slots_N: Tensor) -> Tensor:
        """[N, M]: the same of some slots, for kernels, on the device."""
        return self._tables.index_select(0, slots_N)

    def routing_of(self, slot: int, num_tokens: int) -> NDArray[np.int64] | None:
        """[num_tokens, L, top_k]: the experts of the first tokens of the sequence in a slot, in the L sparse layers.

        None where blocks do not have them. Until the next step they are there also when the sequence has ended.
        """
        if not self.routing:
            return None
        places_T = np.arange(num_tokens)
        pages_T = self.tables()[slot, places_T // self.block_size] * self.block_size + places_T % self.block_size
        index_T = torch.from_numpy(pages_T).to(self.device)
        return torch.stack([pages.flatten(0, 2)[index_T] for pages in self.routing.values()], 1).numpy(force=True)

    @property
    def max_rows(self) -> int:
        """Tokens of a sequence in a decoding step at most."""
        return max(1, min(self.num_draft_tokens, self.block_size))

    def rows_of_nobody(self, lengths: Sequence[int]) -> list[Rows]:
        """Sequences of so many tokens, at most `max_rows`, in the spare slot and its block."""
        assert self.spare_slot is not None, "see CacheSizes.has_spare"
        is_draft = self.num_draft_tokens > 0  # states stay as they are
        return [Rows(self.spare_slot, (0,) * length, 0, is_draft) for length in lengths]

    def _fill(self, blocks: Sequence[int], slots: Sequence[int], value: float) -> None:
        for ids, tensors in (
            # codes of int8 have no NaN, their scales do; of numbers of accepted tokens, none is left
            (blocks, self._paged),
            (slots, [tensor for slots_ in self.delta.values() for tensor in slots_.tensors]),
            (slots, [tensor.unflatten(0, (len(self._table_length), -1)) for tensor in self._of_drafter if len(tensor)]),
        ):
            index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
            for tensor in tensors:
                tensor.index_fill_(0, index, value if tensor.is_floating_point() else 0)


def prompt_grid(state_dtype: torch.dtype, *, is_cut_invariant: bool) -> int:
    """Prompts are cut, and their states kept, at multiples of so many tokens, where no cut changes an answer.

    With `is_cut_invariant` model and caches give the same bits with any cut, unless a narrow state is rounded there.
    """
    return 1 if is_cut_invariant and state_dtype == torch.float32 else DELTA_CHUNK_SIZE


def _make_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> KVPages:
    k, v = (empty_huge(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KVPages(k, v)
    return KVPages(k, v, *(empty_huge(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)))


def _make_slots(
    config: ModelConfig, num_draft_tokens: int, num_accepted: Tensor, state_dtype: torch.dtype
) -> DeltaSlots:
    """On the device of `num_accepted` [num_slots], which becomes a part of them."""
    num_slots, device = len(num_accepted), num_accepted.device
    state_shape = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    conv_shape = (num_slots, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
    conv = empty_huge(conv_shape, dtype=torch.float32, device=device)
    state = empty_huge((num_slots, *state_shape), dtype=state_dtype, device=device)
    if not num_draft_tokens:
        return DeltaSlots(conv, state)
    pending = PendingTokens.empty(
        num_slots,
        num_draft_tokens,
        num_channels=config.linear_conv_dim,
        num_key_heads=config.linear_num_key_heads,
        state_shape=state_shape,
        device=device,
    )
    return DeltaSlots(conv, state, pending._replace(num_accepted=num_accepted))
