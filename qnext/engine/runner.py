"""From a StepPlan to logits: here, and in the drafter for the MTP layer, the engine calls the model.

Legend: T tokens, N sequences, R rows that need a token, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.engine.cache import NUM_SOURCES, Cache
from qnext.engine.recorded import ModelWatch, RecordedBatches, Rows, StepInputs
from qnext.engine.request import Request, SampledToken
from qnext.engine.sampling.logprobs import prompt_logprobs
from qnext.engine.step import SequencePlan, StepPlan
from qnext.errors import NotFinite, QnextError
from qnext.model import Batch, CausalLM
from qnext.ops import Packing, embedding, is_native, put_rows


class PromptPart(NamedTuple):
    """What a step tells of a prompt that asks for it, or why it cannot."""

    request: Request
    tokens: Sequence[SampledToken]
    failure: QnextError | None = None


class RunnerOutput(NamedTuple):
    """fp32 logits [R, Y] of the sequences that need a token, a row for the last known one and one for each draft; what
    the step tells of prompts that ask for it."""

    logits_RY: Tensor
    sequences: list[SequencePlan]
    prompt_tokens: Sequence[PromptPart] = ()
    was_prepared: bool = False  # whether its time is that of the next steps of this kind


class Runner:
    """Runs steps of one model on one cache."""

    def __init__(self, model: CausalLM, cache: Cache) -> None:
        self.model = model
        self.cache = cache
        self.watch = ModelWatch(model)
        self._keeps_sources = cache.sources.shape[0] > 0
        self._decoding = RecordedBatches(cache, self.watch, lambda lengths, _: StepInputs(cache, lengths), self._decode)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> RunnerOutput:
        """Advance the caches by the plan's tokens; logits only where a token is to be chosen.

        The logits may lie in memory that the next step writes.

        Native kernels take all sequences in one batch, so that the weights are read once. For the reference, sequences
        with one token and sequences with more are two batches: its delta rule and attention have their own paths for
        one token, and the others would pad it to a whole chunk.
        """
        self.watch.look()
        self.cache.prepare(plan)
        if not plan.sequences:
            return RunnerOutput(torch.empty(0, self.model.config.vocab_size), [])
        if plan.only_decodes and self._decoding.serves(sum(len(s.token_ids) for s in plan.sequences)):
            rows = [Rows(s.request, s.token_ids, s.start, bool(s.drafts)) for s in plan.sequences]
            logits_TY = self._decoding.run(rows)
            return RunnerOutput(logits_TY, list(plan.sequences), was_prepared=self._decoding.was_prepared)
        parts: list[Tensor] = []
        chosen: list[SequencePlan] = []
        prompt_tokens: list[PromptPart] = []
        for sequences in self._batches(plan):
            if sequences:
                wanted = [s for s in sequences if s.needs_sample]
                logits_RY = self._run_batch(sequences, prompt_tokens)
                if wanted:
                    parts.append(logits_RY)
                    chosen.extend(wanted)
        if not parts:
            return RunnerOutput(torch.empty(0, self.model.config.vocab_size), [], prompt_tokens)
        logits_RY = torch.cat(parts) if len(parts) > 1 else parts[0]
        return RunnerOutput(logits_RY, chosen, prompt_tokens, was_prepared=plan.only_decodes)

    def _decode(self, inputs: StepInputs) -> Tensor:
        """fp32 logits of all rows [T, Y]."""
        trunk = self.model(inputs.batch)
        if self._keeps_sources:
            put_rows(self.model.draft_source(trunk), inputs.source_index_T, self.cache.sources.flatten(0, 1))
        return self.model.logits(trunk.hidden_TD)

    def _batches(self, plan: StepPlan) -> list[list[SequencePlan]]:
        if is_native(self.cache.device):
            return [list(plan.sequences)]
        return [[s for s in plan.sequences if (len(s.token_ids) == 1) == is_single] for is_single in (True, False)]

    def _run_batch(self, sequences: Sequence[SequencePlan], prompt_tokens: list[PromptPart]) -> Tensor:
        device = self.cache.device
        packing = Packing([len(s.token_ids) for s in sequences], device=device)
        tokens = list(chain.from_iterable(s.token_ids for s in sequences))
        starts_N = torch.tensor([s.start for s in sequences], dtype=torch.long, device=device)
        positions_T = packing.offsets_T + starts_N[packing.sequence_ids_T]
        batch = Batch(
            token_ids_T=torch.tensor(tokens, dtype=torch.long, device=device),
            positions_T=positions_T,
            packing=packing,
            cache=self.cache.view(sequences, packing, positions_T, is_draft=[bool(s.drafts) for s in sequences]),
        )
        trunk = self.model(batch)
        if self._keeps_sources:
            self._keep_sources(sequences, self.model.draft_source(trunk))
        parts_TD = trunk.hidden_TD.split([len(s.token_ids) for s in sequences])
        rows: list[int] = []
        end = 0
        for part_TD, sequence in zip(parts_TD, sequences, strict=True):
            request, start = sequence.request, sequence.start
            end += len(sequence.token_ids)
            if request.params.prompt_logprobs is not None and start < len(request.prompt_ids):
                prompt_tokens.append(self._prompt_part(part_TD, request, start))
            if sequence.needs_sample:
                rows.extend(range(end - 1 - len(sequence.drafts), end))
        if not rows:
            return trunk.hidden_TD.new_empty(0, self.model.config.vocab_size)
        rows_R = torch.tensor(rows, device=device)
        return self.model.logits(trunk.hidden_TD.index_select(0, rows_R)).to(torch.float32)

    def _prompt_part(self, hidden_TD: Tensor, request: Request, start: int) -> PromptPart:
        try:
            return PromptPart(request, prompt_logprobs(self.model.logits, hidden_TD, request, start))
        except NotFinite as failure:  # of this prompt alone
            return PromptPart(request, (), failure)

    def _keep_sources(self, sequences: Sequence[SequencePlan], source_TD: Tensor) -> None:
        """The last rows of each sequence, as many as are kept."""
        rows: list[int] = []
        places: list[int] = []
        end = 0
        for sequence in sequences:
            end += len(sequence.token_ids)
            count = min(len(sequence.token_ids), NUM_SOURCES)
            last = sequence.start + len(sequence.token_ids)
            assert sequence.request.slot is not None
            rows += range(end - count, end)
            places += [self.cache.place_of_source(sequence.request.slot, p) for p in range(last - count, last)]
        # By an op of ours: after one of torch's its threads keep a core busy for a while, which the next steps need.
        put_rows(
            embedding(torch.tensor(rows, device=source_TD.device), source_TD),
            torch.tensor(places, device=source_TD.device),
            self.cache.sources.flatten(0, 1),
        )
