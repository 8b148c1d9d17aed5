"""Batches of kernels with no Python between the layers: each size of a batch is recorded on first use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from qnext.engine.execution.cache import Cache
from qnext.engine.execution.inputs import StepInputs
from qnext.engine.policy.step import Rows
from qnext.model import CausalLM
from qnext.ops import ParameterWatch, Recording, backend_of, record

_MAX_ATTEMPTS = 4  # the first may meet conversions that are made once
_MAX_RECORDINGS = 24  # kept; the one used longest ago goes first

Inputs = TypeVar("Inputs", bound="StepInputs")
Result = TypeVar("Result")


def largest_recordings(max_num_seqs: int, max_draft_tokens: int, *, max_tokens: int) -> list[int]:
    """Tokens of the recorded steps that can be kept at a time, where these are the largest. `max_tokens` is the
    backend's bound."""
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
        self._device = cache.device
        self._max_tokens = backend_of(cache.device).max_recorded_tokens
        self._batches: dict[tuple[int, int, int], _Kept[Inputs, Result]] = {}
        self._num_failures: Counter[int] = Counter()  # by tokens of a batch: kernels take few tokens or many
        self.was_prepared = True

    def serves(self, num_tokens: int) -> bool:
        """Whether a batch of so many tokens is to be recorded. A model with hooks runs in Python, where hooks are
        called."""
        return (
            num_tokens <= self._max_tokens
            and self._num_failures.get(num_tokens, 0) < _MAX_ATTEMPTS
            and self._watch.may_record
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
            result, recording = record(partial(self._compute, inputs), self._device)
            if recording is None:
                self._num_failures[num_tokens] += 1
                return result
            kept = _Kept(inputs, result, recording, self._watch.num_changes)
        self._batches[size] = kept
        if len(self._batches) > _MAX_RECORDINGS:
            del self._batches[next(iter(self._batches))]
        return kept.result
