"""Batches of the native kernels with no Python between the layers: each size of a batch is recorded on first use.

Legend: N sequences, T tokens, M pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from qnext.engine.cache import Cache
from qnext.engine.request import Request
from qnext.model import Batch, CacheView, CausalLM
from qnext.ops import Packing, Recording, is_native, record

_MAX_ATTEMPTS = 4  # the first may meet conversions that are made once
_MAX_RECORDINGS = 24  # kept; the one used longest ago goes first
_MAX_TOKENS = 64  # of a batch: in longer ones the time of Python no longer counts, but the memory does

Result = TypeVar("Result")


class Rows(NamedTuple):
    """Consecutive tokens of one sequence, from position `start` on. Attention sees its pages from `first_page` on."""

    request: Request
    token_ids: Sequence[int]
    start: int
    is_draft: bool = False
    first_page: int = 0


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
        self._tables_NM = torch.zeros(num_sequences, cache.max_pages, dtype=torch.long)
        self._packing = Packing(lengths, device=cache.device)

    @property
    def batch(self) -> Batch:
        cache = self._cache
        token_ids_T, positions_T, write_index_T, _ = self._of_tokens.to(cache.device).unbind(0)
        view = CacheView(
            kv=cache.kv,
            delta=cache.delta,
            slots_N=self._of_sequences[0].to(cache.device),
            is_fresh_N=self._is_fresh_N,
            block_tables_NM=self._tables_NM.to(cache.device),
            context_lengths_N=self._of_sequences[1],
            write_index_T=write_index_T,
            has_fresh=False,
            is_draft_N=self._is_draft_N.to(cache.device) if cache.num_draft_tokens else None,
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
        cache, tables_NM = self._cache, self._tables_NM.numpy()
        of_tokens: list[tuple[int, int, int, int]] = []
        of_sequences: list[tuple[int, int, int, int]] = []
        starts = [0]
        for n, part in enumerate(rows):
            slot, end = cache.bind(part.request), part.start + len(part.token_ids)
            pages_M = cache.table_of(slot)
            if cache.kv:
                num_pages = -(-end // cache.block_size)
                tables_NM[n, : num_pages - part.first_page] = pages_M[part.first_page : num_pages]
            for position, token_id in enumerate(part.token_ids, start=part.start):
                page, offset = divmod(position, cache.block_size)
                place = int(pages_M[page]) * cache.block_size + offset if cache.kv else 0
                of_tokens.append((token_id, position, place, cache.place_of_source(slot, position)))
            starts.append(len(of_tokens))
            context = end - part.first_page * cache.block_size
            of_sequences.append((slot, context, len(of_tokens) - 1, cache.place_of_source(slot, end)))
        self._of_tokens.numpy()[:] = list(zip(*of_tokens, strict=True))
        self._of_sequences.numpy()[:] = list(zip(*of_sequences, strict=True))
        if self._cache.device.type == "cpu":
            self._packing.cu_seqlens.numpy()[:] = starts
        self._is_draft_N.numpy()[:] = [part.is_draft for part in rows]


class _Kept(NamedTuple, Generic[Result]):
    inputs: StepInputs
    result: Result
    recording: Recording


class RecordedBatches(Generic[Result]):
    """One function of batches, recorded for each size of a batch that recurs.

    `compute` reads its inputs and writes nothing but the caches and the rows that the cache keeps for drafting.
    """

    def __init__(self, model: CausalLM, cache: Cache, compute: Callable[[StepInputs], Result]) -> None:
        self._model, self._cache, self._compute = model, cache, compute
        self._batches: dict[tuple[int, int], _Kept[Result]] = {}
        self._num_failures = 0
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def serves(self, num_tokens: int) -> bool:
        """Whether a batch of so many tokens is to be recorded. A model with hooks runs in Python, where hooks are
        called."""
        return (
            num_tokens <= _MAX_TOKENS
            and self._num_failures < _MAX_ATTEMPTS
            and is_native(self._cache.device)
            and not any(self._hooks)
        )

    def run(self, rows: Sequence[Rows]) -> Result:
        """The function's result, in memory that the next batch of this size writes again."""
        num_tokens = sum(len(part.token_ids) for part in rows)
        if not self.serves(num_tokens):
            inputs = StepInputs(self._cache, [len(part.token_ids) for part in rows])
            inputs.fill(rows)
            return self._compute(inputs)
        size = (len(rows), num_tokens)
        kept = self._batches.pop(size, None)
        if kept is not None and kept.recording.is_current():
            kept.inputs.fill(rows)
            kept.recording.replay()
        else:
            inputs = StepInputs(self._cache, [len(part.token_ids) for part in rows])
            inputs.fill(rows)
            result, recording = record(partial(self._compute, inputs), parameters=self._model.parameters())
            if recording is None:
                self._num_failures += 1
                return result
            kept = _Kept(inputs, result, recording)
        self._batches[size] = kept
        if len(self._batches) > _MAX_RECORDINGS:
            del self._batches[next(iter(self._batches))]
        return kept.result
