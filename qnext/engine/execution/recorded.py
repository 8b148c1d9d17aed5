"""Batches of kernels with no Python between the layers: each size of a batch is recorded on first use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from qnext.engine.execution.cache import Cache
from qnext.engine.execution.inputs import StepInputs
from qnext.engine.execution.padded import padded_sizes, padding_of
from qnext.engine.policy.step import Rows
from qnext.model import CausalLM
from qnext.ops import ParameterWatch, Recording, backend_of, record
from qnext.probe import ModelProbe, Passing, Sight

_MAX_ATTEMPTS = 4  # the first may meet conversions that are made once
_MAX_RECORDINGS = 24  # kept; the one used longest ago goes first
_MAX_PADDED = 40  # the same of padded batches: all sizes of sequences without drafts

Taps: TypeAlias = frozenset[str]
Inputs = TypeVar("Inputs", bound="StepInputs")
Result = TypeVar("Result")


def largest_recordings(
    max_num_seqs: int, max_draft_tokens: int, *, max_tokens: int, is_padded: bool = False
) -> list[int]:
    """Tokens of the recorded steps that can be kept at a time, where these are the largest. `max_tokens` is the
    backend's bound, and so is whether batches are padded."""
    if is_padded:
        max_rows = max_draft_tokens + 1
        return sorted(padded_sizes(max_num_seqs, max_rows, max_tokens=max_tokens), reverse=True)[:_MAX_PADDED]
    sizes = (
        num_tokens
        for num_sequences in range(1, min(max_num_seqs, max_tokens) + 1)
        for num_tokens in range(num_sequences, min(max_tokens, num_sequences * (1 + max_draft_tokens)) + 1)
    )
    return sorted(sizes, reverse=True)[:_MAX_RECORDINGS]


class ModelWatch:
    """What recordings of a model depend on, as it was when `look` was called last; and whether there may be any."""

    def __init__(self, model: CausalLM) -> None:
        self.may_record = True
        self._parameters = ParameterWatch(model.parameters())
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.num_changes = 0
        self.probe: ModelProbe | None = None  # that looks at the model
        self.sight: Sight | None = None  # of the probe, where its hooks are the only ones and a replay does without
        self.needs_hooks = False  # in every step

    def look(self) -> None:
        """To be called before each step, and before drafting for one: in between, nobody changes a model."""
        self.num_changes = self._parameters.num_changes()
        self.needs_hooks, self.sight, probe = any(self._hooks), None, self.probe
        if self.needs_hooks and probe is not None and probe.sight.is_replayable:
            self.needs_hooks = sum(map(len, self._hooks)) > probe.num_hooks
            self.sight = None if self.needs_hooks else probe.sight


class _Kept(NamedTuple, Generic[Inputs, Result]):
    inputs: Inputs
    result: Result
    passing: Passing  # what a probe sees
    recording: Recording
    num_changes: int  # of parameters, when it was made


class RecordedBatches(Generic[Inputs, Result]):
    """One function of batches, recorded for each size of a batch that recurs, and for each set of taps of a probe.

    `make_inputs` takes how many rows each sequence has and the depth of the drafts. `compute` reads its inputs and
    writes nothing but the caches. `was_prepared` says of the last batch that nothing was done for the first time: its
    time is that of the next ones.

    Where the cache has a spare slot, batches are padded to few sizes, as far as `without` can take the rows of padding
    out of a result: it is given the result and how many sequences and tokens come before them.
    """

    def __init__(
        self,
        cache: Cache,
        watch: ModelWatch,
        make_inputs: Callable[[Sequence[int], int], Inputs],
        compute: Callable[[Inputs], Result],
        without: Callable[[Result, int, int], Result] | None = None,
    ) -> None:
        self._cache, self._without = cache, None if cache.spare_slot is None else without
        self._watch, self._make_inputs, self._compute = watch, make_inputs, compute
        self._device = cache.device
        self._max_tokens = backend_of(cache.device).max_recorded_tokens
        self._batches: dict[tuple[int, int, int, Taps], _Kept[Inputs, Result]] = {}
        # by tokens of a batch: kernels take few tokens or many
        self._num_failures: Counter[tuple[int, Taps]] = Counter()
        self.was_prepared = True

    def serves(self, num_tokens: int) -> bool:
        """Whether a batch of so many tokens is to be recorded. A model with hooks runs in Python, where hooks are
        called; those of a probe are not, where it only sees what a replay computes."""
        return (
            num_tokens <= self._max_tokens
            and self._num_failures.get((num_tokens, self._taps), 0) < _MAX_ATTEMPTS
            and self._watch.may_record
            and not self._watch.needs_hooks
        )

    @property
    def _taps(self) -> Taps:
        return frozenset() if self._watch.sight is None else self._watch.sight.wanted

    def run(self, rows: Sequence[Rows], *, depth: int = 1, recurs: bool = True) -> Result:
        """The function's result, in memory that the next batch of this size writes again. What was recorded before
        parameters changed is recorded anew; a size that hardly `recurs` is not recorded."""
        lengths = [len(part.token_ids) for part in rows]
        num_tokens = sum(lengths)
        if recurs and self.serves(num_tokens):
            if self._without is None or self._watch.sight is not None:  # a probe sees the rows of requests alone
                return self._recorded(rows, depth)
            padding = padding_of(len(rows), num_tokens, max_rows=self._cache.max_rows, max_tokens=self._max_tokens)
            if padding is not None and self.serves(num_tokens + sum(padding)):
                result = self._recorded([*rows, *self._cache.rows_of_nobody(padding)], depth)
                return self._without(result, len(rows), num_tokens)
        inputs = self._make_inputs(lengths, depth)
        inputs.fill(rows)
        self.was_prepared = recurs
        return self._compute(inputs)

    def _recorded(self, rows: Sequence[Rows], depth: int) -> Result:
        lengths = [len(part.token_ids) for part in rows]
        num_tokens = sum(lengths)
        size = (len(rows), num_tokens, depth, self._taps)
        kept = self._batches.pop(size, None)
        self.was_prepared = kept is not None and kept.num_changes == self._watch.num_changes
        if kept is not None and self.was_prepared:
            kept.inputs.fill(rows)
            kept.recording.replay()
        else:
            inputs = self._make_inputs(lengths, depth)
            inputs.fill(rows)
            result, passing, recording = self._record(inputs)
            if recording is None:
                self._num_failures[num_tokens, self._taps] += 1
                self._keep_passed(passing)
                return result
            kept = _Kept(inputs, result, passing, recording, self._watch.num_changes)
        self._batches[size] = kept
        if len(self._batches) > (_MAX_RECORDINGS if self._without is None else _MAX_PADDED):
            del self._batches[next(iter(self._batches))]
        self._keep_passed(kept.passing)
        return kept.result

    def _record(self, inputs: Inputs) -> tuple[Result, Passing, Recording | None]:
        """The result, what passes by the taps, and a recording of both."""
        sight = self._watch.sight
        runs: list[Passing] = []

        def compute() -> tuple[Result, list[Tensor]]:
            with nullcontext(Passing()) if sight is None else sight.passing() as passing:
                runs.append(passing)
                return self._compute(inputs), passing.tensors

        (result, tensors), recording = record(compute, self._device)
        return result, runs[0].at(tensors), recording

    def _keep_passed(self, passing: Passing) -> None:
        if self._watch.sight is not None:
            self._watch.sight.keep_passed(passing)
