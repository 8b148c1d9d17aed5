"""Batches of the native kernels with no Python between the layers: each size of a batch is recorded on first use.

Legend: N sequences, T tokens, M pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.cache import NUM_DRAFT_PAGES, Cache
from qnext.engine.request import Request
from qnext.model import Batch, CacheView, CausalLM, KVPages
from qnext.ops import Packing, ParameterWatch, Recording, is_native, record

_MAX_ATTEMPTS = 4  # the first may meet conversions that are made once
_MAX_RECORDINGS = 24  # kept; the one used longest ago goes first
_MAX_TOKENS = 64  # of a batch: in longer ones the time of Python no longer counts, but the memory does

Inputs = TypeVar("Inputs", bound="StepInputs")
Result = TypeVar("Result")
Ints: TypeAlias = NDArray[np.int64]


def largest_recordings(max_num_seqs: int, max_draft_tokens: int) -> list[int]:
    """Tokens of the recorded steps that can be kept at a time, where these are the largest."""
    sizes = (
        num_tokens
        for num_sequences in range(1, min(max_num_seqs, _MAX_TOKENS) + 1)
        for num_tokens in range(num_sequences, min(_MAX_TOKENS, num_sequences * (1 + max_draft_tokens)) + 1)
    )
    return sorted(sizes, reverse=True)[:_MAX_RECORDINGS]


class Rows(NamedTuple):
    """Consecutive tokens of one sequence, from position `start` on. For the MTP layer the sequence begins at `base`."""

    request: Request
    token_ids: Sequence[int]
    start: int
    is_draft: bool = False
    base: int = 0


class StepInputs:
    """What a batch of so many rows of each sequence reads: on the CPU at fixed places, where `fill` puts it.

    A recording goes on reading there when the rows of each sequence have become more or fewer, as long as their sums
    are the same: kernels read from memory where sequences start.
    """

    def __init__(self, cache: Cache, lengths: Sequence[int]) -> None:
        self._cache = cache
        num_sequences, num_tokens = len(lengths), sum(lengths)
        # token ids, positions, places in the pages, places among the draft sources
        self._of_tokens = torch.zeros(4, num_tokens, dtype=torch.long)
        # slots, context lengths, last rows, places of the draft sources that come next
        self._of_sequences = torch.zeros(4, num_sequences, dtype=torch.long)
        self._is_draft_N = torch.zeros(num_sequences, dtype=torch.bool)
        self._is_fresh_N = torch.zeros(num_sequences, dtype=torch.bool, device=cache.device)
        self._tables_NM = torch.zeros(num_sequences, self._num_pages, dtype=torch.long)
        self._packing = Packing(lengths, device=cache.device)
        # What `fill` writes; on the CPU it is the packing's own.
        self._starts = self._packing.cu_seqlens.numpy(force=True)
        self._arrays = [
            tensor.numpy() for tensor in (self._of_tokens, self._of_sequences, self._is_draft_N, self._tables_NM)
        ]

    @property
    def _num_pages(self) -> int:
        return self._cache.max_pages

    @property
    def _kv(self) -> Mapping[int, KVPages]:
        return self._cache.kv

    @property
    def batch(self) -> Batch:
        cache = self._cache
        token_ids_T, positions_T, write_index_T, _ = self._of_tokens.to(cache.device).unbind(0)
        view = CacheView(
            kv=self._kv,
            delta=cache.delta,
            slots_N=self._of_sequences[0].to(cache.device),
            is_fresh_N=self._is_fresh_N,
            block_tables_NM=self._tables_NM.to(cache.device),
            context_lengths_N=self._of_sequences[1],
            write_index_T=write_index_T,
            has_fresh=False,
            is_draft_N=self._is_draft_N.to(cache.device) if cache.num_draft_tokens else None,
            expert_load=cache.expert_load,
        )
        return Batch(token_ids_T, positions_T, self._packing, view)

    @property
    def source_index_T(self) -> Tensor:
        """Places of the rows among the draft sources of the cache."""
        return self._of_tokens[3].to(self._cache.device)

    @property
    def last_rows_N(self) -> Tensor:
        return self._of_sequences[2].to(self._cache.device)

    @property
    def next_source_index_N(self) -> Tensor:
        """Places among the draft sources of what comes after the last rows."""
        return self._of_sequences[3].to(self._cache.device)

    def fill(self, rows: Sequence[Rows]) -> None:
        """Put these rows there: as many sequences and tokens as there is room for."""
        self._fill(rows)

    def _fill(self, rows: Sequence[Rows]) -> tuple[Ints, Ints, Ints]:
        """Returns the slots of the sequences, where their rows end, and their bases."""
        slots_N, counts_N, first_N, bases_N = np.array(
            [(self._cache.bind(part.request), len(part.token_ids), part.start, part.base) for part in rows]
        ).T
        starts = self._starts
        np.cumsum(counts_N, out=starts[1:])
        slots_T, positions_T = slots_N, first_N
        if len(rows) < self._of_tokens.shape[1]:
            slots_T = np.repeat(slots_N, counts_N)
            positions_T = np.arange(starts[-1]) + np.repeat(first_N - starts[:-1], counts_N)
            bases_T = np.repeat(bases_N, counts_N)
        else:
            bases_T = bases_N
        of_tokens, of_sequences, is_draft_N, _ = self._arrays
        of_tokens[0] = list(chain.from_iterable(part.token_ids for part in rows))
        of_sequences[2] = starts[1:] - 1
        is_draft_N[:] = [part.is_draft for part in rows]
        ends_N = first_N + counts_N
        self._place(slots_N, ends_N, bases_N, slots_T, positions_T, bases_T)
        return slots_N, ends_N, bases_N

    def _place(
        self, slots_N: Ints, ends_N: Ints, bases_N: Ints, slots_T: Ints, positions_T: Ints, bases_T: Ints
    ) -> None:
        of_tokens, of_sequences, _, _ = self._arrays
        of_tokens[1] = positions_T
        of_tokens[3] = self._cache.place_of_source(slots_T, positions_T)
        of_sequences[0] = slots_N
        of_sequences[3] = self._cache.place_of_source(slots_N, ends_N)
        self._point_to_pages(slots_N, ends_N - bases_N, slots_T, positions_T - bases_T)

    def _point_to_pages(self, slots_N: Ints, ends_N: Ints, slots_T: Ints, places_T: Ints) -> None:
        of_tokens, of_sequences, _, tables_NM = self._arrays
        size = self._cache.block_size
        of_sequences[1] = ends_N
        if self._cache.kv:
            tables = self._cache.tables()
            of_tokens[2] = tables[slots_T, places_T // size] * size + places_T % size
            for n, (slot, end) in enumerate(zip(slots_N, -(-ends_N // size), strict=True)):
                tables_NM[n, :end] = tables[slot, :end]


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

    @property
    def _kv(self) -> Mapping[int, KVPages]:
        return self._cache.draft_kv

    def fill(self, rows: Sequence[Rows]) -> None:
        slots_N, ends_N, bases_N = self._fill(rows)
        for steps, inputs in enumerate(self.later):
            positions_N = ends_N + steps
            inputs._place(slots_N, positions_N + 1, bases_N, slots_N, positions_N, bases_N)

    def _point_to_pages(self, slots_N: Ints, ends_N: Ints, slots_T: Ints, places_T: Ints) -> None:
        """Places count from where the MTP layer began. It sees as much of what is before as its pages hold."""
        of_tokens, of_sequences, _, tables_NM = self._arrays
        size = self._cache.block_size
        pages_T = slots_T * NUM_DRAFT_PAGES + places_T // size % NUM_DRAFT_PAGES
        of_tokens[2] = pages_T * size + places_T % size
        first_pages_N = np.maximum(0, (ends_N - 1) // size - NUM_DRAFT_PAGES + 1)
        of_sequences[1] = ends_N - first_pages_N * size
        pages_NM = first_pages_N[:, None] + np.arange(NUM_DRAFT_PAGES)
        tables_NM[:] = slots_N[:, None] * NUM_DRAFT_PAGES + pages_NM % NUM_DRAFT_PAGES


class ModelWatch:
    """What recordings of a model depend on, as it was when `look` was called last."""

    def __init__(self, model: CausalLM) -> None:
        self._parameters = ParameterWatch(model.parameters())
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.num_changes = 0
        self.has_hooks = False

    def look(self) -> None:
        """To be called before each step, and before drafting for one: in between, nobody changes a model."""
        self.num_changes = self._parameters.num_changes()
        self.has_hooks = any(self._hooks)


class _Kept(NamedTuple, Generic[Inputs, Result]):
    inputs: Inputs
    result: Result
    recording: Recording
    num_changes: int  # of parameters, when it was made


class RecordedBatches(Generic[Inputs, Result]):
    """One function of batches, recorded for each size of a batch that recurs.

    `make_inputs` takes how many rows each sequence has and the depth of the drafts. `compute` reads its inputs and
    writes nothing but the caches. `was_prepared` says of the last batch that nothing was done for the first time: its
    time is that of the next ones.
    """

    def __init__(
        self,
        cache: Cache,
        watch: ModelWatch,
        make_inputs: Callable[[Sequence[int], int], Inputs],
        compute: Callable[[Inputs], Result],
    ) -> None:
        self._watch, self._make_inputs, self._compute = watch, make_inputs, compute
        self._is_native = is_native(cache.device)
        self._batches: dict[tuple[int, int, int], _Kept[Inputs, Result]] = {}
        self._num_failures = 0
        self.was_prepared = True

    def serves(self, num_tokens: int) -> bool:
        """Whether a batch of so many tokens is to be recorded. A model with hooks runs in Python, where hooks are
        called."""
        return (
            num_tokens <= _MAX_TOKENS
            and self._num_failures < _MAX_ATTEMPTS
            and self._is_native
            and not self._watch.has_hooks
        )

    def run(self, rows: Sequence[Rows], *, depth: int = 1, recurs: bool = True) -> Result:
        """The function's result, in memory that the next batch of this size writes again. What was recorded before
        parameters changed is recorded anew; a size that hardly `recurs` is not recorded."""
        lengths = [len(part.token_ids) for part in rows]
        num_tokens = sum(lengths)
        if not recurs or not self.serves(num_tokens):
            inputs = self._make_inputs(lengths, depth)
            inputs.fill(rows)
            self.was_prepared = recurs
            return self._compute(inputs)
        size = (len(rows), num_tokens, depth)
        kept = self._batches.pop(size, None)
        self.was_prepared = kept is not None and kept.num_changes == self._watch.num_changes
        if kept is not None and self.was_prepared:
            kept.inputs.fill(rows)
            kept.recording.replay()
        else:
            inputs = self._make_inputs(lengths, depth)
            inputs.fill(rows)
            result, recording = record(partial(self._compute, inputs))
            if recording is None:
                self._num_failures += 1
                return result
            kept = _Kept(inputs, result, recording, self._watch.num_changes)
        self._batches[size] = kept
        if len(self._batches) > _MAX_RECORDINGS:
            del self._batches[next(iter(self._batches))]
        return kept.result
