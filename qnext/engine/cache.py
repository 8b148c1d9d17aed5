"""The memory of a running engine: pages of keys and values, slots of recurrent state.

Legend: N sequences of a step, T tokens of a step, M pages of a sequence, P tokens in a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from qnext.engine.request import Request
from qnext.engine.step import SequencePlan, StepPlan
from qnext.model import CacheView, DeltaSlots, KVPages
from qnext.ops import DELTA_CHUNK_SIZE, Packing, PendingTokens, apply_pending, empty_huge, is_native, touch

BLOCK_SIZE = 16
NUM_SOURCES, NUM_DRAFT_PAGES = 64, 32
STATE_DTYPES = (torch.float32, torch.bfloat16)


class Cache:
    """Pages for every full-attention layer and slots for every linear layer of the trunk.

    With `has_drafter`, each slot has what the MTP layer needs: in `sources` the rows of the trunk that it reads, of the
    last `NUM_SOURCES` positions, that of position p at place p modulo their number; and in `draft_kv`, under the number
    of the layer after the last, `NUM_DRAFT_PAGES` pages for its own keys and values, which go round as well. Neither is
    shared or copied: a layer that only guesses may forget.

    Keys and values are kept in `dtype` unless `kv_dtype` says otherwise; in int8 they have an fp32 scale per token and
    head. The recurrent states of the linear layers are kept in `state_dtype`: fp32, or bf16 for half the memory, which
    is rounded where DeltaCache says; inputs of the convolution, a twentieth of it, are fp32: native activations have
    that width whatever the weights are. With `num_draft_tokens`, a step may compute up to that many
    tokens of a sequence before it is known how many of them it keeps: see `commit`. With `poison`, memory that has no
    owner is filled with NaN, so that reading it shows (for tests). `expert_load` has the counters of the views.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block_size: int = BLOCK_SIZE,
        num_draft_tokens: int = 0,
        has_drafter: bool = False,
        expert_load: Mapping[int, Tensor] | None = None,
        poison: bool = False,
    ) -> None:
        self.state_dtype = state_dtype
        self.expert_load = expert_load or {}
        self.block_size = block_size
        self.poison = poison
        self.num_draft_tokens = num_draft_tokens
        self.device = torch.device(device)
        kinds = list(enumerate(config.layer_types))
        source_dtype = torch.float32 if is_native(self.device) else dtype
        self.sources = torch.zeros(
            num_slots if has_drafter else 0, NUM_SOURCES, config.hidden_size, dtype=source_dtype, device=self.device
        )
        kv_shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self.kv = {
            index: _make_pages(kv_shape, kv_dtype or dtype, self.device)
            for index, kind in kinds
            if kind == FULL_ATTENTION
        }
        self.draft_kv: dict[int, KVPages] = {}
        if has_drafter:
            draft_shape = (num_slots * NUM_DRAFT_PAGES, *kv_shape[1:])
            self.draft_kv[config.num_hidden_layers] = _make_pages(draft_shape, kv_dtype or dtype, self.device)
        linear = [index for index, kind in kinds if kind == LINEAR_ATTENTION]
        self._num_accepted = torch.zeros(len(linear), num_slots, dtype=torch.long, device=device)
        self._accepted_on_host = self._num_accepted.numpy() if self.device.type == "cpu" else None
        self.delta = {
            index: _make_slots(config, num_slots, num_draft_tokens, accepted, self.device, state_dtype)
            for index, accepted in zip(linear, self._num_accepted.unbind(), strict=True)
        }
        # One row of page numbers per slot: a step selects rows instead of copying whole tables from Python.
        self.max_pages = max(1, -(-max_model_len // block_size)) if self.kv else 1
        self._tables = torch.zeros(num_slots, self.max_pages, dtype=torch.long, device=device)
        self._table_owner: list[str | None] = [None] * num_slots
        self._table_length = [0] * num_slots
        # Memory that nobody wrote is only promised: it could run out in the middle of a step.
        pages = [tensor for layer in self.kv.values() for tensor in layer.tensors]
        states = [tensor for layer in self.delta.values() for tensor in layer.tensors]
        touch([self._tables, *pages, *states, *self._of_drafter])
        if poison:
            self._fill_nan(range(num_blocks), range(num_slots))

    @property
    def kv_bytes(self) -> int:
        """Bytes that the pages of all layers occupy."""
        return sum(tensor.nbytes for pages in self.kv.values() for tensor in pages.tensors)

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

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> None:
        """Before the tokens of a step: forget what was freed (`poison`: overwrite it), load prefixes, make copies."""
        for slot in plan.freed_slots:
            self._table_owner[slot] = None
        if self.poison:
            self._fill_nan(plan.freed_blocks, plan.freed_slots)
        for load in plan.loads:
            load.fetch.write(load)
        for source, target in plan.block_copies:
            for pages in self.kv.values():
                for tensor in pages.tensors:
                    tensor[target].copy_(tensor[source])
        for source, target in plan.slot_copies:  # one by one: the target of one may be the source of the next
            self.copy_slots([source], [target])

    def view(
        self,
        sequences: Sequence[SequencePlan],
        packing: Packing,
        positions_T: Tensor,
        *,
        is_draft: Sequence[bool] | None = None,
    ) -> CacheView:
        """Where the given sequences of a step read and write, and which of them may yet reject their tokens."""
        slots = [self.bind(sequence.request) for sequence in sequences]
        contexts = tuple(sequence.start + len(sequence.token_ids) for sequence in sequences)
        prompts = [len(sequence.request.prompt_ids) for sequence in sequences]
        slots_N = torch.tensor(slots, dtype=torch.long, device=self.device)
        num_pages = -(-max(contexts) // self.block_size) if self.kv else 1
        tables_NM = self._tables[slots_N, :num_pages]
        if self.kv:
            pages_T = tables_NM[packing.sequence_ids_T, positions_T // self.block_size]
            write_index_T = pages_T * self.block_size + positions_T % self.block_size
        else:
            write_index_T = torch.zeros_like(positions_T)
        return CacheView(
            kv=self.kv,
            delta=self.delta,
            slots_N=slots_N,
            is_fresh_N=torch.tensor([sequence.start == 0 for sequence in sequences], device=self.device),
            block_tables_NM=tables_NM,
            context_lengths_N=torch.tensor(contexts),
            write_index_T=write_index_T,
            has_fresh=any(sequence.start == 0 for sequence in sequences),
            is_draft_N=torch.tensor(is_draft, device=self.device) if is_draft is not None and any(is_draft) else None,
            prompt_lengths_N=torch.tensor(prompts) if self.state_dtype != torch.float32 else None,
            expert_load=self.expert_load,
        )

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

    def bind(self, request: Request) -> int:
        """Slot of the sequence, whose table row is written when it is new there and goes on as blocks are added."""
        slot = request.slot
        assert slot is not None
        if self._table_owner[slot] != request.id:
            assert self._table_owner[slot] is None, f"slot {slot} is still bound to {self._table_owner[slot]}"
            self._table_owner[slot], self._table_length[slot] = request.id, 0
        known, count = self._table_length[slot], len(request.blocks)
        if known < count:
            blocks = torch.tensor(request.blocks[known:], dtype=torch.long)
            self._tables[slot, known:count] = blocks.to(self.device)
            self._table_length[slot] = count
        return slot

    def tables(self) -> NDArray[np.int64]:
        """Page numbers of the sequence in each slot, as far as it is bound; a copy unless the cache is on the CPU."""
        tables: NDArray[np.int64] = self._tables.numpy(force=True)
        return tables

    def _fill_nan(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        for ids, tensors in (
            # codes of int8 have no NaN, their scales do; of numbers of accepted tokens, none is left
            (blocks, [tensor for pages in self.kv.values() for tensor in pages.tensors]),
            (slots, [tensor for slots_ in self.delta.values() for tensor in slots_.tensors]),
            (slots, [tensor.unflatten(0, (len(self._table_owner), -1)) for tensor in self._of_drafter if len(tensor)]),
        ):
            index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
            for tensor in tensors:
                tensor.index_fill_(0, index, float("nan") if tensor.is_floating_point() else 0)


def prompt_grid(device: torch.device, state_dtype: torch.dtype) -> int:
    """Prompts are cut, and their states kept, at multiples of so many tokens, where no cut changes an answer.

    Native kernels compute the same bits with any cut, unless a narrow state is rounded there.
    """
    return 1 if is_native(device) and state_dtype == torch.float32 else DELTA_CHUNK_SIZE


def _make_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> KVPages:
    k, v = (empty_huge(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KVPages(k, v)
    return KVPages(k, v, *(empty_huge(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)))


def _make_slots(
    config: ModelConfig, num_slots: int, num_draft_tokens: int, num_accepted: Tensor, device: torch.device,
    state_dtype: torch.dtype,
) -> DeltaSlots:  # fmt: skip
    state_shape = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    conv_shape = (num_slots, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
    conv = empty_huge(conv_shape, dtype=torch.float32, device=device)
    state = empty_huge((num_slots, *state_shape), dtype=state_dtype, device=device)
    if not num_draft_tokens:
        return DeltaSlots(conv, state)
    pending = PendingTokens.empty(
        num_slots, num_draft_tokens, num_channels=config.linear_conv_dim, num_key_heads=config.linear_num_key_heads,
        state_shape=state_shape, device=device,
    )  # fmt: skip
    return DeltaSlots(conv, state, pending._replace(num_accepted=num_accepted))
