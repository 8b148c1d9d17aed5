"""Decoding steps of the native kernels with no Python between the layers.

Legend: N sequences, T tokens, one of each sequence and its drafts, M pages of a sequence, Y vocabulary.
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
_MAX_RECORDINGS = 24  # kept; the one used longest ago goes first
_MAX_TOKENS = 64  # of a step: in longer ones the time of Python no longer counts, but the memory does


class RecordedSteps:
    """Runs steps in which every sequence goes on from its last token, each size of a step recorded on first use."""

    def __init__(self, model: CausalLM, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._steps: dict[tuple[int, int], _Step] = {}
        self._num_failures = 0
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def serves(self, sequences: Sequence[SequencePlan]) -> bool:
        """Whether `run` takes this step. A model with hooks runs in Python, where hooks are called."""
        return (
            self._num_failures < _MAX_ATTEMPTS
            and is_native(self._cache.device)
            and all(len(s.token_ids) == 1 + len(s.drafts) and s.start > 0 and s.needs_sample for s in sequences)
            and sum(len(s.token_ids) for s in sequences) <= _MAX_TOKENS
            and not any(self._hooks)
        )

    def run(self, sequences: Sequence[SequencePlan]) -> Tensor:
        """fp32 logits [T, Y], in memory that the next step of this size writes again."""
        size = (len(sequences), sum(len(s.token_ids) for s in sequences))
        step = self._steps.pop(size, None)
        if step is None or not step.is_current():
            step = _Step(self._model, self._cache, [len(s.token_ids) for s in sequences])
        logits_TY = step.run(sequences)
        if step.is_recorded:
            self._steps[size] = step
            if len(self._steps) > _MAX_RECORDINGS:
                del self._steps[next(iter(self._steps))]
        else:
            self._num_failures += 1
        return logits_TY


class _Step:
    """Input of a step at fixed places, and the recording that reads it."""

    def __init__(self, model: CausalLM, cache: Cache, lengths: Sequence[int]) -> None:
        self._model, self._cache = model, cache
        self._recording: Recording | None = None
        num_sequences, num_tokens = len(lengths), sum(lengths)
        # token ids, positions, places in the pages
        self._of_tokens = torch.zeros(3, num_tokens, dtype=torch.long)
        # slots, context lengths
        self._of_sequences = torch.zeros(2, num_sequences, dtype=torch.long)
        self._is_draft_N = torch.zeros(num_sequences, dtype=torch.bool)
        self._tables_NM = torch.zeros(num_sequences, cache.max_pages, dtype=torch.long)
        token_ids_T, positions_T, write_index_T = self._of_tokens.unbind(0)
        slots_N, context_lengths_N = self._of_sequences.unbind(0)
        # The lengths are those of the first step. Later ones differ: kernels read where sequences start from memory.
        packing = Packing(lengths)
        self._starts_N = packing.cu_seqlens
        view = CacheView(
            kv=cache.kv,
            delta=cache.delta,
            slots_N=slots_N,
            is_fresh_N=torch.zeros(num_sequences, dtype=torch.bool),
            block_tables_NM=self._tables_NM,
            context_lengths_N=context_lengths_N,
            write_index_T=write_index_T,
            has_fresh=False,
            is_draft_N=self._is_draft_N if cache.num_draft_tokens else None,
            expert_load=cache.expert_load,
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
            self._logits_TY, self._recording = record(self._compute, parameters=self._model.parameters())
        return self._logits_TY

    def _compute(self) -> Tensor:
        return self._model.logits(self._model(self._batch).hidden_TD)

    def _fill(self, sequences: Sequence[SequencePlan]) -> None:
        cache, tables_NM = self._cache, self._tables_NM.numpy()
        of_tokens: list[tuple[int, int, int]] = []
        of_sequences: list[tuple[int, int]] = []
        starts = [0]
        for n, sequence in enumerate(sequences):
            slot, end = cache.bind(sequence), sequence.start + len(sequence.token_ids)
            pages_M = cache.table_of(slot)
            if cache.kv:
                num_pages = -(-end // cache.block_size)
                tables_NM[n, :num_pages] = pages_M[:num_pages]
            for position, token_id in enumerate(sequence.token_ids, start=sequence.start):
                page, offset = divmod(position, cache.block_size)
                place = int(pages_M[page]) * cache.block_size + offset if cache.kv else 0
                of_tokens.append((token_id, position, place))
            of_sequences.append((slot, end))
            starts.append(len(of_tokens))
        self._of_tokens.numpy()[:] = list(zip(*of_tokens, strict=True))
        self._of_sequences.numpy()[:] = list(zip(*of_sequences, strict=True))
        self._starts_N.numpy()[:] = starts
        self._is_draft_N.numpy()[:] = [bool(s.drafts) for s in sequences]
