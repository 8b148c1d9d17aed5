"""Decoding steps of the native kernels with no Python between the layers.

Legend: N sequences with one token each, M pages of a sequence, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.engine.cache import Cache
from qnext.engine.step import SequencePlan
from qnext.model import Batch, CacheView, CausalLM
from qnext.ops import Packing, Recording, is_native, record

_MAX_ATTEMPTS = 4  # the first may meet conversions that are made once


class RecordedSteps:
    """Runs steps in which every sequence goes on by one token, each number of sequences recorded on first use."""

    def __init__(self, model: CausalLM, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._steps: dict[int, _Step] = {}
        self._num_failures = 0
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def serves(self, sequences: Sequence[SequencePlan]) -> bool:
        """Whether `run` takes this step. A model with hooks runs in Python, where hooks are called."""
        return (
            self._num_failures < _MAX_ATTEMPTS
            and is_native(self._cache.device)
            and all(len(s.token_ids) == 1 and s.start > 0 and s.needs_sample for s in sequences)
            and not any(self._hooks)
        )

    def run(self, sequences: Sequence[SequencePlan]) -> Tensor:
        """fp32 logits [N, Y], in memory that the next step of as many sequences writes again."""
        step = self._steps.get(len(sequences))
        if step is None or not step.is_current():
            step = self._steps[len(sequences)] = _Step(self._model, self._cache, len(sequences))
        logits_NY = step.run(sequences)
        if not step.is_recorded:
            self._num_failures += 1
            del self._steps[len(sequences)]
        return logits_NY


class _Step:
    """Input of a step at fixed places, and the recording that reads it."""

    def __init__(self, model: CausalLM, cache: Cache, num_sequences: int) -> None:
        self._model, self._cache = model, cache
        self._recording: Recording | None = None
        # token ids, positions, slots, places in the pages, context lengths
        self._numbers = torch.zeros(5, num_sequences, dtype=torch.long)
        self._tables_NM = torch.zeros(num_sequences, cache.max_pages, dtype=torch.long)
        token_ids_T, positions_T, slots_N, write_index_T, context_lengths_N = self._numbers.unbind(0)
        packing = Packing([1] * num_sequences)
        assert packing.cu_seqlens.shape[0] == num_sequences + 1  # made now: later it would be a computation of torch
        view = CacheView(
            kv=cache.kv,
            delta=cache.delta,
            slots_N=slots_N,
            is_fresh_N=torch.zeros(num_sequences, dtype=torch.bool),
            block_tables_NM=self._tables_NM,
            context_lengths_N=context_lengths_N,
            write_index_T=write_index_T,
            has_fresh=False,
        )
        self._batch = Batch(token_ids_T, positions_T, packing, view)

    @property
    def is_recorded(self) -> bool:
        return self._recording is not None

    def is_current(self) -> bool:
        return self._recording is not None and self._recording.is_current()

    def run(self, sequences: Sequence[SequencePlan]) -> Tensor:
        self._fill(sequences)
        if self._recording is not None:
            self._recording.replay()
        else:
            self._logits_NY, self._recording = record(self._compute, parameters=self._model.parameters())
        return self._logits_NY

    def _compute(self) -> Tensor:
        return self._model.logits(self._model(self._batch).hidden_TD)

    def _fill(self, sequences: Sequence[SequencePlan]) -> None:
        cache, tables_NM = self._cache, self._tables_NM.numpy()
        columns = []
        for n, sequence in enumerate(sequences):
            position, slot, place = sequence.start, cache.bind(sequence), 0
            if cache.kv:
                pages_M = cache.table_of(slot)
                last_page, offset = divmod(position, cache.block_size)
                tables_NM[n, : last_page + 1] = pages_M[: last_page + 1]
                place = int(pages_M[last_page]) * cache.block_size + offset
            columns.append((sequence.token_ids[0], position, slot, place, position + 1))
        self._numbers.numpy()[:] = list(zip(*columns, strict=True))
