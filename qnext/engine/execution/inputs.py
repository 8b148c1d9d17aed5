"""From rows of sequences to what the model reads: token ids, positions, places in the cache.

Legend: N sequences, T tokens, M pages of a sequence, K drafted tokens one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.execution.cache import NUM_DRAFT_PAGES, Cache
from qnext.engine.execution.mirror import Mirror
from qnext.engine.execution.padded import NUM_EXACT
from qnext.engine.policy.step import Rows
from qnext.model import Batch, CacheView, KVPages
from qnext.ops import Packing, backend_of

Ints: TypeAlias = NDArray[np.int64]


class StepInputs:
    """What a batch of so many rows of each sequence reads: at fixed places, where `fill` puts it. The one place that
    makes views of a cache. No sequence begins in it.

    A recording goes on reading there when the rows of each sequence have become more or fewer, as long as their sums
    are the same: kernels read from memory where sequences start. `fill` writes on the host, and on a GPU sends that to
    the device; what `batch` computes of it is computed there, so that a graph has it too.
    """

    def __init__(self, cache: Cache, lengths: Sequence[int]) -> None:
        self._cache = cache
        num_sequences, num_tokens = len(lengths), sum(lengths)
        # token ids, positions, places in the pages, places among the draft sources
        self._of_tokens = Mirror((4, num_tokens), cache.device)
        # slots, context lengths, last rows, places of the draft sources that come next
        self._of_sequences = Mirror((4, num_sequences), cache.device)
        self._is_draft = Mirror((num_sequences,), cache.device, dtype=torch.bool)
        self._is_fresh_N = torch.zeros(num_sequences, dtype=torch.bool, device=cache.device)
        self._has_fresh = False
        self._may_draft = cache.num_draft_tokens > 0
        self._prompt_lengths_N: Tensor | None = None
        self._host_lengths: tuple[int, ...] | None = None
        self._tables = self._own_tables(num_sequences)
        self._packing = Packing(lengths, device=cache.device)
        self._starts = Mirror((num_sequences + 1,), cache.device, at=self._packing.cu_seqlens)
        self._starts.host[1:] = np.cumsum(lengths)
        self._of_sequences.host[2] = self._starts.host[1:] - 1
        self._has_sources = len(cache.sources) > 0
        counts_some = cache.spare_slot is not None and cache.expert_load and num_sequences > NUM_EXACT
        self._is_counted = Mirror((num_tokens * cache.num_chosen,), cache.device) if counts_some else None
        self.adapters_T: Tensor | None = None  # of the rows; None where none has one
        mirrors = (self._of_tokens, self._of_sequences, self._is_draft, self._starts, self._tables, self._is_counted)
        self._mirrors = [mirror for mirror in mirrors if mirror is not None]
        self._to_send = [] if cache.device.type == "cpu" else self._mirrors

    def _own_tables(self, num_sequences: int) -> Mirror | None:
        """Where the pages of the sequences are written. On a GPU they are read from those of all slots."""
        is_here = self._cache.device.type == "cpu"
        return Mirror((num_sequences, self._num_pages), self._cache.device) if is_here else None

    @property
    def _num_pages(self) -> int:
        return self._cache.max_pages

    @property
    def _kv(self) -> Mapping[int, KVPages]:
        return self._cache.kv

    @property
    def _routing(self) -> Mapping[int, Tensor]:
        return self._cache.routing

    @property
    def batch(self) -> Batch:
        cache = self._cache
        token_ids_T, positions_T, write_index_T, _ = self._of_tokens.device.unbind(0)
        slots_N, lengths_N = self._of_sequences.device[:2].unbind(0)
        tables = cache.tables_of(slots_N)[:, : self._num_pages] if self._tables is None else self._tables.device
        view = CacheView(
            kv=self._kv,
            delta=cache.delta,
            slots_N=slots_N,
            is_fresh_N=self._is_fresh_N,
            block_tables_NM=tables,
            context_lengths_N=self._of_sequences.on_host[1],
            write_index_T=write_index_T,
            has_fresh=self._has_fresh,
            is_draft_N=self._is_draft.device if self._may_draft else None,
            prompt_lengths_N=self._prompt_lengths_N,
            expert_load=cache.expert_load,
            is_counted_P=None if self._is_counted is None else self._is_counted.device,
            routing=self._routing,
            lengths_there_N=lengths_N if backend_of(cache.device).can_record else None,
            host_lengths=self._host_lengths,
        )
        return Batch(token_ids_T, positions_T, self._packing, view)

    @property
    def source_index_T(self) -> Tensor:
        """Places of the rows among the draft sources of the cache."""
        return self._of_tokens.device[3]

    @property
    def last_rows_N(self) -> Tensor:
        return self._of_sequences.device[2]

    @property
    def next_source_index_N(self) -> Tensor:
        """Places among the draft sources of what comes after the last rows."""
        return self._of_sequences.device[3]

    def fill(self, rows: Sequence[Rows]) -> None:
        """Put these rows there: as many sequences and tokens as there is room for."""
        self._fill(rows)
        self._send()

    def _begin(self) -> None:
        for mirror in self._to_send:
            mirror.begin()

    def _send(self) -> None:
        for mirror in self._to_send:
            mirror.send()

    def _fill(self, rows: Sequence[Rows], bases_N: Ints | None = None) -> tuple[Ints, Ints]:
        """Returns the slots of the sequences and where their rows end. Each sequence begins at its base, or at zero."""
        slots_N, counts_N, first_N = np.array([(part.slot, len(part.token_ids), part.start) for part in rows]).T
        self._begin()
        of_tokens, of_sequences = self._of_tokens.host, self._of_sequences.host
        slots_T, positions_T, bases_T = slots_N, first_N, bases_N
        if len(rows) < of_tokens.shape[1]:  # else each has one row, and where they lie is always the same
            starts = self._starts.host
            np.cumsum(counts_N, out=starts[1:])
            of_sequences[2] = starts[1:] - 1
            slots_T = np.repeat(slots_N, counts_N)
            positions_T = np.arange(starts[-1]) + np.repeat(first_N - starts[:-1], counts_N)
            bases_T = None if bases_N is None else np.repeat(bases_N, counts_N)
        of_tokens[0] = list(chain.from_iterable(part.token_ids for part in rows))
        if self._may_draft:
            self._is_draft.host[:] = [part.is_draft for part in rows]
        ends_N = first_N + counts_N
        self._place(slots_N, ends_N, bases_N, slots_T, positions_T, bases_T)
        return slots_N, ends_N

    def _place(
        self,
        slots_N: Ints,
        ends_N: Ints,
        bases_N: Ints | None,
        slots_T: Ints,
        positions_T: Ints,
        bases_T: Ints | None,
    ) -> None:
        of_tokens, of_sequences = self._of_tokens.host, self._of_sequences.host
        of_tokens[1] = positions_T
        of_sequences[0] = slots_N
        adapters = self._cache.adapters
        # Of few numbers Python is done before numpy has begun, and decoding waits for it.
        has_adapter = any(adapters[slots_N].tolist())
        self.adapters_T = torch.from_numpy(adapters[slots_T]).to(self._cache.device) if has_adapter else None
        if self._is_counted is not None:
            self._is_counted.host[:] = np.repeat(slots_T != self._cache.spare_slot, self._cache.num_chosen)
        if self._has_sources:
            of_tokens[3] = self._cache.place_of_source(slots_T, positions_T)
            of_sequences[3] = self._cache.place_of_source(slots_N, ends_N)
        if bases_N is not None and bases_T is not None:
            ends_N, positions_T = ends_N - bases_N, positions_T - bases_T
        self._point_to_pages(slots_N, ends_N, slots_T, positions_T)

    def _point_to_pages(self, slots_N: Ints, ends_N: Ints, slots_T: Ints, places_T: Ints) -> None:
        size = self._cache.block_size
        self._of_sequences.host[1] = ends_N
        if self._cache.kv:
            tables = self._cache.tables()
            self._of_tokens.host[2] = tables[slots_T, places_T // size] * size + places_T % size
            if self._tables is not None:
                width = -(-max(ends_N.tolist()) // size)
                self._tables.host[:, :width] = tables[slots_N, :width]


class MixedInputs(StepInputs):
    """Any rows: those that are given, once and for all. Sequences may begin in them."""

    def __init__(self, cache: Cache, rows: Sequence[Rows]) -> None:
        self._width = -(-max(part.start + len(part.token_ids) for part in rows) // cache.block_size) if cache.kv else 1
        super().__init__(cache, [len(part.token_ids) for part in rows])
        self._is_fresh_N = torch.tensor([part.start == 0 for part in rows], device=cache.device)
        self._has_fresh = any(part.start == 0 for part in rows)
        self._may_draft = any(part.is_draft for part in rows)
        self._host_lengths = tuple(part.start + len(part.token_ids) for part in rows)
        if cache.state_dtype != torch.float32:
            self._prompt_lengths_N = torch.tensor([part.num_prompt for part in rows])
        self.fill(rows)

    @property
    def _num_pages(self) -> int:
        return self._width


class DraftInputs(StepInputs):
    """Rows of the MTP layer, whose pages go round; and for `depth` tokens drafted one after another, the rows that
    each of them makes. `drafts_KN` is where these tokens are put."""

    def __init__(self, cache: Cache, lengths: Sequence[int], depth: int = 1) -> None:
        super().__init__(cache, lengths)
        self.drafts_KN = torch.zeros(depth, len(lengths), dtype=torch.long, device=cache.device)
        self.later = [DraftInputs(cache, [1] * len(lengths)) for _ in range(depth - 1)]

    @property
    def _num_pages(self) -> int:
        return NUM_DRAFT_PAGES

    def _own_tables(self, num_sequences: int) -> Mirror:
        return Mirror((num_sequences, NUM_DRAFT_PAGES), self._cache.device)

    @property
    def _kv(self) -> Mapping[int, KVPages]:
        return self._cache.draft_kv

    @property
    def _routing(self) -> Mapping[int, Tensor]:
        return {}

    def fill(self, rows: Sequence[Rows]) -> None:
        bases_N = np.array([part.base for part in rows])
        slots_N, ends_N = self._fill(rows, bases_N)
        for steps, inputs in enumerate(self.later):
            positions_N = ends_N + steps
            inputs._begin()
            inputs._place(slots_N, positions_N + 1, bases_N, slots_N, positions_N, bases_N)
        for inputs in (self, *self.later):
            inputs._send()

    def _point_to_pages(self, slots_N: Ints, ends_N: Ints, slots_T: Ints, places_T: Ints) -> None:
        """Places count from where the MTP layer began. It sees as much of what is before as its pages hold."""
        assert self._tables is not None
        size = self._cache.block_size
        pages_T = slots_T * NUM_DRAFT_PAGES + places_T // size % NUM_DRAFT_PAGES
        self._of_tokens.host[2] = pages_T * size + places_T % size
        first_pages_N = np.maximum(0, (ends_N - 1) // size - NUM_DRAFT_PAGES + 1)
        self._of_sequences.host[1] = ends_N - first_pages_N * size
        pages_NM = first_pages_N[:, None] + np.arange(NUM_DRAFT_PAGES)
        self._tables.host[:] = slots_N[:, None] * NUM_DRAFT_PAGES + pages_NM % NUM_DRAFT_PAGES
