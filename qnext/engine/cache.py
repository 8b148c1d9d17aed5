"""The memory of a running engine: pages of keys and values, slots of recurrent state.

Legend: N sequences of a step, T tokens of a step, M pages of a sequence, P tokens in a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from qnext.engine.step import SequencePlan, StepPlan
from qnext.model import CacheView, DeltaSlots, KVPages
from qnext.ops import Packing, empty_huge

BLOCK_SIZE = 16


class Cache:
    """Pages for every full-attention layer and slots for every linear layer of the trunk.

    Keys and values are kept in `dtype` unless `kv_dtype` says otherwise; in int8 they have an fp32 scale per token and
    head. Both states of the linear layers are fp32: native activations have that width whatever the weights are, and a
    rounded state would make the cuts of a prefill visible. With `poison`, memory that has no owner is filled with NaN,
    so that reading it shows (for tests).
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
        device: torch.device | str = "cpu",
        block_size: int = BLOCK_SIZE,
        poison: bool = False,
    ) -> None:
        self.block_size = block_size
        self.poison = poison
        self.device = torch.device(device)
        kinds = list(enumerate(config.layer_types))
        kv_shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self.kv = {
            index: _make_pages(kv_shape, kv_dtype or dtype, self.device)
            for index, kind in kinds
            if kind == FULL_ATTENTION
        }
        conv_shape = (num_slots, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
        state_shape = (
            num_slots, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim,
        )  # fmt: skip
        self.delta = {
            index: DeltaSlots(
                empty_huge(conv_shape, dtype=torch.float32, device=device),
                empty_huge(state_shape, dtype=torch.float32, device=device),
            )
            for index, kind in kinds
            if kind == LINEAR_ATTENTION
        }
        # One row of page numbers per slot: a step selects rows instead of copying whole tables from Python.
        self.max_pages = max(1, -(-max_model_len // block_size)) if self.kv else 1
        self._tables = torch.zeros(num_slots, self.max_pages, dtype=torch.long, device=device)
        self._table_owner: list[str | None] = [None] * num_slots
        self._table_length = [0] * num_slots
        if poison:
            self._fill_nan(range(num_blocks), range(num_slots))

    @property
    def kv_bytes(self) -> int:
        """Bytes that the pages of all layers occupy."""
        return sum(tensor.nbytes for pages in self.kv.values() for tensor in pages.tensors)

    @property
    def state_bytes(self) -> int:
        """Bytes that the slots of all layers occupy."""
        return sum(tensor.nbytes for slots in self.delta.values() for tensor in slots)

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> None:
        """Before the tokens of a step: forget what was freed (with `poison`, overwrite it), then make the copies."""
        for slot in plan.freed_slots:
            self._table_owner[slot] = None
        if self.poison:
            self._fill_nan(plan.freed_blocks, plan.freed_slots)
        for source, target in plan.block_copies:
            for pages in self.kv.values():
                for tensor in pages.tensors:
                    tensor[target].copy_(tensor[source])
        for source, target in plan.slot_copies:
            for slots in self.delta.values():
                for tensor in slots:
                    tensor[target].copy_(tensor[source])

    def view(self, sequences: Sequence[SequencePlan], packing: Packing, positions_T: Tensor) -> CacheView:
        """Where the given sequences of a step read and write."""
        slots = [self.bind(sequence) for sequence in sequences]
        contexts = tuple(sequence.start + len(sequence.token_ids) for sequence in sequences)
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
        )

    def bind(self, sequence: SequencePlan) -> int:
        """Slot of the sequence, whose table row is written when it is new there and goes on as blocks are added."""
        request = sequence.request
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

    def table_of(self, slot: int) -> NDArray[np.int64]:
        """Page numbers of the sequence in a slot; shares the memory of a cache on the CPU."""
        table: NDArray[np.int64] = self._tables[slot].numpy()
        return table

    def _fill_nan(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        for ids, tensors in (
            # codes of int8 have no NaN, their scales do
            (blocks, [tensor for pages in self.kv.values() for tensor in pages.tensors]),
            (slots, [tensor for slots_ in self.delta.values() for tensor in slots_]),
        ):
            index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
            for tensor in tensors:
                tensor.index_fill_(0, index, float("nan") if tensor.is_floating_point() else 0)


def _make_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> KVPages:
    k, v = (empty_huge(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KVPages(k, v)
    return KVPages(k, v, *(empty_huge(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)))
