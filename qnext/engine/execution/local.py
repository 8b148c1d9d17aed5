"""Plans on the tensors of this process.

Legend: T tokens, N sequences, R rows that need a token, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.execution.cache import NUM_SOURCES, Cache
from qnext.engine.execution.draft_passes import DraftPasses, draft_costs
from qnext.engine.execution.executor import AdapterSwitch, DraftOutput, PromptPart, StepOutput
from qnext.engine.execution.expert_load import ExpertCounter
from qnext.engine.execution.expert_reads import ExpertReads
from qnext.engine.execution.inputs import MixedInputs, StepInputs
from qnext.engine.execution.recorded import ModelWatch, RecordedBatches
from qnext.engine.memory import HeldBytes
from qnext.engine.policy.archive import Load
from qnext.engine.policy.prefix_node import Spill
from qnext.engine.policy.step import DraftPlan, PromptScores, Rows, SequencePlan, StepPlan
from qnext.engine.sampling.logprobs import prompt_logprobs
from qnext.errors import NotFinite
from qnext.model import CausalLM, held_bytes, named_weights, residency_of
from qnext.ops import backend_of, embedding, put_rows
from qnext.planning import state_bytes_per_sequence
from qnext.probe import Glance, Glancer
from qnext.residency.hosted import HostedLayers


class PrefixStore(Protocol):
    """Prefixes beyond the device's memory, copied out of a cache and into it."""

    def save(self, spills: Sequence[Spill]) -> None: ...

    def write(self, load: Load) -> None: ...

    def close(self, spills: Sequence[Spill] = ()) -> None: ...


class LocalExecutor:
    """Runs steps of one model on one cache. `workspace_bytes` bounds what steps take beside these."""

    def __init__(
        self,
        model: CausalLM,
        cache: Cache,
        *,
        store: PrefixStore | None = None,
        experts: ExpertCounter | None = None,
        adapters: AdapterSwitch | None = None,
        workspace_bytes: int = 0,
    ) -> None:
        self.model = model
        self.model_config = model.config
        self.cache = cache
        self.store = store
        self.experts = experts
        self.adapters: Mapping[str, str] = {} if adapters is None else adapters.fingerprints
        self.watch = ModelWatch(model)
        self._workspace_bytes = workspace_bytes
        self._residency = residency_of(model)
        hosted = HostedLayers.of(weight for _, weight in named_weights(model))
        self._experts_from = self._residency if hosted is None else hosted
        self._counts_before = {} if self._experts_from is None else self._experts_from.counts()
        self._drafts = cache.sources.shape[0] > 0
        self.draft_costs = draft_costs(model) if self._drafts else None
        self._decoding = RecordedBatches(
            cache,
            self.watch,
            lambda lengths, _: StepInputs(cache, lengths),
            self._decode,
            without=lambda logits_TY, _, num_tokens: logits_TY[:num_tokens],
        )
        self._draft_passes = DraftPasses(model, cache, self.watch, adapters)
        self._switch = adapters
        # While it is open, this thread starts kernels on the cache's device.
        self._on_device: Callable[[], AbstractContextManager[object]] = nullcontext
        if cache.device.type == "cuda":
            self._on_device = partial(torch.cuda.device, cache.device)
        self._glancer = Glancer(model)
        self.request_of_slot: dict[int, str | int] | None = None  # is kept up to date where somebody wants it

    def execute(self, plan: StepPlan) -> StepOutput:
        """Advance the caches by the plan's tokens; logits only where a token is to be chosen.

        A backend that mixes lengths takes all sequences in one batch, so that the weights are read once. For another,
        sequences with one token and sequences with more are two batches: PyTorch's delta rule and attention have paths
        of their own for one token, and the others would pad it to a whole chunk.
        """
        with self._on_device():
            if not self._glancer.is_asked or not plan.sequences:
                return self._execute(plan)
            with self._glancer.watching():
                return self._execute(plan)._replace(was_prepared=False)

    def _execute(self, plan: StepPlan) -> StepOutput:
        self._prepare(plan)
        if not plan.sequences:
            return StepOutput(torch.empty(0, self.model_config.vocab_size), ())
        if self._may_record(plan.sequences):
            logits_TY = self._decoding.run([_rows_of(s) for s in plan.sequences])
            return StepOutput(logits_TY, tuple(range(len(plan.sequences))), was_prepared=self._decoding.was_prepared)
        parts: list[Tensor] = []
        order: tuple[int, ...] = ()
        prompt_tokens: list[PromptPart] = []
        for numbers in self._batches(plan):
            sequences = [plan.sequences[n] for n in numbers]
            if not sequences:
                continue
            if self._may_record(sequences):  # beside prompts
                logits_RY = self._decoding.run([_rows_of(s) for s in sequences])
            else:
                logits_RY = self._run_batch(sequences, prompt_tokens)
            if wanted := tuple(n for n in numbers if plan.sequences[n].needs_sample):
                parts.append(logits_RY)
                order += wanted
        if not parts:
            return StepOutput(torch.empty(0, self.model_config.vocab_size), (), prompt_tokens)
        logits_RY = torch.cat(parts) if len(parts) > 1 else parts[0]
        return StepOutput(logits_RY, order, prompt_tokens, was_prepared=plan.only_decodes)

    def draft(self, plan: DraftPlan) -> DraftOutput:
        with self._on_device():
            return self._draft_passes.run(plan)

    def glance(self) -> Glance | None:
        """What a step showed of gates and states after the last call; the next step will be looked at. Any thread may
        ask."""
        return self._glancer.ask()

    def held_bytes(self) -> HeldBytes:
        state_dtype = str(self.cache.state_dtype).removeprefix("torch.")
        return HeldBytes(
            weights=held_bytes(self.model),
            experts=0 if self._residency is None else self._residency.nbytes,
            kv=self.cache.kv_bytes,
            states=self.cache.state_bytes,
            workspace=self._workspace_bytes,
            state_of_sequence=state_bytes_per_sequence(self.model_config, state_dtype=state_dtype).total,
            device=str(self.cache.device),
        )

    def routing_of(self, slot: int, num_tokens: int) -> NDArray[np.int64] | None:
        return self.cache.routing_of(slot, num_tokens)

    def expert_reads(self) -> ExpertReads | None:
        return None if self._experts_from is None else ExpertReads.of(self._experts_from, self._counts_before)

    def close(self, *plans: StepPlan) -> None:
        for plan in plans:
            self._prepare(plan._replace(spills=()))
        if self.store is not None:
            self.store.close([spill for plan in plans for spill in plan.spills])

    def _prepare(self, plan: StepPlan) -> None:
        """All that comes before the tokens of a step."""
        for slot, num_accepted in plan.accepted:
            self.cache.commit(slot, num_accepted)
        if self.store is not None and plan.spills:
            self.store.save(plan.spills)
        self.watch.look()
        if self.request_of_slot is not None:
            self.request_of_slot.update((s.slot, s.request_id) for s in plan.sequences)
        self.cache.forget(plan)
        for load in plan.loads:
            assert self.store is not None
            self.store.write(load)
        self.cache.prepare(plan)

    @torch.inference_mode()
    def _decode(self, inputs: StepInputs) -> Tensor:
        """fp32 logits of all rows [T, Y]."""
        self._select(None)
        trunk = self.model(inputs.batch)
        if self._drafts:
            put_rows(self.model.draft_source(trunk), inputs.source_index_T, self.cache.sources.flatten(0, 1))
        return self.model.logits(trunk.hidden_TD).to(torch.float32)

    def _may_record(self, sequences: Sequence[SequencePlan]) -> bool:
        """Whether these are a batch that is recorded."""
        are_plain = all(s.decodes and not s.adapter for s in sequences)
        return are_plain and self._decoding.serves(sum(len(s.token_ids) for s in sequences))

    def _select(self, adapters_T: Tensor | None) -> None:
        if self._switch is not None:
            self._switch.select(adapters_T)

    def _batches(self, plan: StepPlan) -> list[list[int]]:
        """The numbers of the sequences that run together: those that a recording takes, single tokens, longer ones."""
        numbers = range(len(plan.sequences))
        if backend_of(self.cache.device).mixes_lengths:
            return [list(numbers)]
        decoding = [n for n in numbers if plan.sequences[n].decodes]
        if not self._may_record([plan.sequences[n] for n in decoding]):
            decoding = []
        rest = sorted(set(numbers).difference(decoding))
        is_single = [len(s.token_ids) == 1 for s in plan.sequences]
        return [decoding, *([n for n in rest if is_single[n] == single] for single in (True, False))]

    @torch.inference_mode()
    def _run_batch(self, sequences: Sequence[SequencePlan], prompt_tokens: list[PromptPart]) -> Tensor:
        inputs = MixedInputs(self.cache, [_rows_of(s) for s in sequences])
        self._select(inputs.adapters_T)
        trunk = self.model(inputs.batch)
        if self._drafts:
            self._keep_sources(sequences, self.model.draft_source(trunk))
        parts_TD = trunk.hidden_TD.split([len(s.token_ids) for s in sequences])
        rows: list[int] = []
        end = 0
        for part_TD, sequence in zip(parts_TD, sequences, strict=True):
            end += len(sequence.token_ids)
            if sequence.scores is not None:
                prompt_tokens.append(self._prompt_part(part_TD, sequence.request_id, sequence.scores))
            if sequence.needs_sample:
                rows.extend(range(end - 1 - sequence.num_drafts, end))
        if not rows:
            return trunk.hidden_TD.new_empty(0, self.model_config.vocab_size)
        rows_R = torch.tensor(rows, device=self.cache.device)
        return self.model.logits(trunk.hidden_TD.index_select(0, rows_R)).to(torch.float32)

    def _prompt_part(self, hidden_TD: Tensor, request_id: str, scores: PromptScores) -> PromptPart:
        try:
            return PromptPart(request_id, prompt_logprobs(self.model.logits, hidden_TD, scores))
        except NotFinite as failure:  # of this prompt alone
            return PromptPart(request_id, (), failure)

    def _keep_sources(self, sequences: Sequence[SequencePlan], source_TD: Tensor) -> None:
        """The last rows of each sequence, as many as are kept."""
        rows: list[int] = []
        places: list[int] = []
        end = 0
        for sequence in sequences:
            end += len(sequence.token_ids)
            count = min(len(sequence.token_ids), NUM_SOURCES)
            last = sequence.start + len(sequence.token_ids)
            rows += range(end - count, end)
            places += [self.cache.place_of_source(sequence.slot, p) for p in range(last - count, last)]
        # By an op of ours: after one of torch's its threads keep a core busy for a while, which the next steps need.
        put_rows(
            embedding(torch.tensor(rows, device=source_TD.device), source_TD),
            torch.tensor(places, device=source_TD.device),
            self.cache.sources.flatten(0, 1),
        )


def _rows_of(sequence: SequencePlan) -> Rows:
    return Rows(sequence.slot, sequence.token_ids, sequence.start, sequence.num_drafts > 0, sequence.num_prompt)
