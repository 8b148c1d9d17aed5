"""The MTP layer at work: what the next tokens may be.

Row p of the layer reads the trunk's row of position p and the token at p + 1, and leads to the token at p + 2. Its
keys and values need not reach back to the start of the sequence: a request that has not drafted for a while, or that
has just read its prompt, begins with the rows that are kept of the last positions. Tokens that are drafted one after
another take the layer's own result for the trunk's row that is not there yet. Whatever comes out, `verify` decides
what the answer is: this is about speed alone.

Legend: N sequences, T rows, R rows of one sequence, D hidden, Y vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from qnext.engine.cache import Cache
from qnext.engine.memory import weight_bytes
from qnext.engine.recorded import DraftInputs, ModelWatch, RecordedBatches, Rows
from qnext.engine.request import Request
from qnext.engine.sampling.sampler import Verdict, Window, draft
from qnext.engine.speculation.draft_lengths import Drafting, DraftLengths, step_shapes
from qnext.model import Batch, CausalLM
from qnext.model.moe import Experts
from qnext.ops import argmax, embedding, put_rows

DEFAULT_DRAFT_TOKENS = 3
_FIRST_ROWS = 32  # with which a request begins to draft
_COMPARED = 16  # of them, with what came
_LONG_GAP = 16  # rows that are made up for, at most
_STEPS_BETWEEN, _STEPS_OF_REST = 4, 32  # two looks at the lengths, while drafting and while not


class Drafter:
    """Proposes tokens for the requests of one engine, as many as pay.

    `draft` goes before a step, `learn` after it. Between the two the request's `drafts` are verified.
    """

    def __init__(self, model: CausalLM, cache: Cache, watch: ModelWatch, *, max_draft_tokens: int) -> None:
        self._model, self._cache, self._watch = model, cache, watch
        self.lengths = _lengths(model, max_draft_tokens)
        make_inputs = partial(DraftInputs, cache)
        self._chains = RecordedBatches(cache, watch, make_inputs, self._draft_chain)
        self._passes = RecordedBatches(cache, watch, make_inputs, self._draft_rows)
        self._first_rows = RecordedBatches(cache, watch, make_inputs, self._compare_rows)
        self._num_steps = 0
        self._next_look = 0
        self._num_requests = 0  # the choice holds for so many, and for some steps
        self._wanted: list[int] | None = None

    # ---- before a step ----

    def draft(self, requests: Sequence[Request]) -> None:
        """Set `drafts` of these requests, all of which go on from their last token; no first token is kept waiting."""
        self._num_steps += 1
        requests = [request for request in requests if request.output_ids]
        if self._num_steps >= self._next_look or len(requests) != self._num_requests:
            self._look(requests)
        if self._wanted is not None:
            self._propose(requests, self._wanted)

    @torch.inference_mode()
    def _look(self, requests: Sequence[Request]) -> None:
        """Choose lengths anew, after a probe where one is due."""
        draftings = [self._drafting_of(request) for request in requests]
        wanted = self._choose(requests, draftings)
        idle = [n for n, length in enumerate(wanted) if not length and self._can_begin(requests[n])]
        if idle:
            n = min(idle, key=lambda n: draftings[n].last_probe)
            num_left = requests[n].max_cached_tokens - requests[n].num_tokens
            if self.lengths.may_probe(draftings[n], num_left=num_left, num_sequences=len(requests)):
                self._begin(requests[n], draftings[n])
                wanted = self._choose(requests, draftings)
        self._num_requests = len(requests)
        self._wanted = wanted if any(wanted) else None
        self._next_look = self._num_steps + (_STEPS_OF_REST if self._wanted is None else _STEPS_BETWEEN)

    def learn(self, windows: Sequence[Window], verdicts: Sequence[Verdict], *, seconds: float | None) -> None:
        """What became of the drafts of a step, which took so long if that is a measure for others."""
        if self._wanted is None:
            if seconds is not None:
                self.lengths.observe_step(len(windows), seconds)
            return
        if seconds is not None:
            self.lengths.observe_step(sum(1 + len(window.draft_ids) for window in windows), seconds)
        for window, verdict in zip(windows, verdicts, strict=True):
            drafting = window.request.drafting
            if window.draft_ids and drafting is not None:
                # A request that ends says nothing of the drafts after its end.
                pairs = list(zip(window.draft_ids, verdict.tokens, strict=False))
                num_right = sum(drafted == token.token_id for drafted, token in pairs)
                drafting.acceptance.observe(num_right, len(pairs))

    # ---- where the layer's keys and values begin, and what it can read ----

    def _drafting_of(self, request: Request) -> Drafting:
        if request.drafting is None:
            request.drafting = self.lengths.new_request()
        drafting = request.drafting
        if drafting.admission != request.num_admissions:
            drafting.admission, drafting.first_row, drafting.num_rows = request.num_admissions, 0, 0
        return drafting

    def _choose(self, requests: Sequence[Request], draftings: Sequence[Drafting]) -> list[int]:
        most = [r.max_cached_tokens - r.num_tokens if self._can_begin(r) else 0 for r in requests]
        return self.lengths.choose(draftings, most)

    def _can_begin(self, request: Request) -> bool:
        """Whether there is more than the one row that every step has."""
        return request.num_computed_tokens - request.num_reused_tokens > 1

    # ---- passes of the layer ----

    @torch.inference_mode()
    def _propose(self, requests: Sequence[Request], wanted: Sequence[int]) -> None:
        """All requests go through the layer, those that want few drafts, or none, as well: so their rows stay complete,
        and there are few sizes of batches."""
        self._watch.look()
        most = [min(k, r.max_cached_tokens - r.num_tokens) for k, r in zip(wanted, requests, strict=True)]
        able = [n for n, request in enumerate(requests) if self._can_begin(request)]
        depth = max((most[n] for n in able), default=0)
        if depth <= 0:
            return
        chosen = [requests[n] for n in able]
        start = time.perf_counter()
        rows = self._missing_rows(chosen)
        if all(request.params.is_greedy for request in chosen):
            drafts = self._chains.run(rows, depth=depth).T.tolist()
            was_prepared = self._chains.was_prepared
        else:
            drafts = self._draft_one_by_one(chosen, rows, depth)
            was_prepared = self._passes.was_prepared
        if was_prepared:
            self.lengths.passes.observe(len(chosen), (time.perf_counter() - start) / depth)
        for n, tokens in zip(able, drafts, strict=True):
            requests[n].drafts = tuple(tokens[: max(0, most[n])])

    def _draft_one_by_one(self, requests: Sequence[Request], rows: Sequence[Rows], depth: int) -> list[list[int]]:
        """Draws as `verify` will draw, with its numbers."""
        drafts: list[list[int]] = [[] for _ in requests]
        for done in range(depth):
            logits_NY = self._passes.run(rows)
            indices = [len(request.output_ids) + done for request in requests]
            for tokens, token in zip(drafts, draft(logits_NY, requests, indices), strict=True):
                tokens.append(token)
            rows = [
                Rows(part.request, tokens[-1:], part.start + len(part.token_ids), base=part.base)
                for part, tokens in zip(rows, drafts, strict=True)
            ]
        return drafts

    def _missing_rows(self, requests: Sequence[Request]) -> list[Rows]:
        """The rows up to the last position that the trunk has computed, at least one of each request.

        As many of each, as far as they are there, though some are computed again: so there are few sizes of batches.
        """
        most = 1 + self.lengths.max_draft_tokens
        for request in requests:
            drafting = self._drafting_of(request)
            gap = request.num_computed_tokens - drafting.num_rows
            if gap > _LONG_GAP or drafting.num_rows <= drafting.first_row:
                self._begin(request, drafting)
            elif gap > most:
                most = _LONG_GAP
        rows = []
        for request in requests:
            drafting = self._drafting_of(request)
            end = drafting.num_rows = request.num_computed_tokens
            start = max(drafting.first_row, end - most)
            rows.append(Rows(request, request.token_range(start + 1, end + 1), start, base=drafting.first_row))
        return rows

    def _draft_rows(self, inputs: DraftInputs) -> Tensor:
        """fp32 logits [N, Y] of the last row of each sequence. Its result is kept as the source of the next one."""
        return self._next_logits(inputs, inputs.batch)

    def _draft_chain(self, inputs: DraftInputs) -> Tensor:
        """[K, N]: the most likely tokens, one after another."""
        logits_NY = self._next_logits(inputs, inputs.batch)
        for ids_N, later in zip_longest(inputs.drafts_KN.unbind(0), inputs.later):
            argmax(logits_NY, ids_N)
            if later is not None:
                logits_NY = self._next_logits(later, replace(later.batch, token_ids_T=ids_N))
        return inputs.drafts_KN

    def _next_logits(self, inputs: DraftInputs, batch: Batch) -> Tensor:
        hidden_TD = self._layer(inputs, batch)
        is_last = hidden_TD.shape[0] == len(inputs.last_rows_N)
        last_ND = hidden_TD if is_last else embedding(inputs.last_rows_N, hidden_TD)
        put_rows(last_ND, inputs.next_source_index_N, self._cache.sources.flatten(0, 1))
        return self._model.logits(last_ND).to(torch.float32)

    def _begin(self, request: Request, drafting: Drafting) -> None:
        """Compute the rows of the last positions anew, and see what the layer would have drafted for tokens that are
        known by now. Costs a pass of the layer and no step."""
        self._watch.look()
        started = time.perf_counter()
        end = request.num_computed_tokens
        first = max(request.num_reused_tokens, end - _FIRST_ROWS)
        drafting.first_row, drafting.num_rows, drafting.last_probe = first, end, self._num_steps
        rows = Rows(request, request.token_range(first + 1, end + 1), first, base=first)
        logits_RY = self._first_rows.run([rows], recurs=end - first == _FIRST_ROWS)
        known = request.token_range(end + 1 - len(logits_RY), end + 1)
        first_index = end + 1 - len(known) - len(request.prompt_ids)
        indices = [max(0, first_index + i) for i in range(len(known))]
        for guess, token in zip(draft(logits_RY, [request] * len(known), indices), known, strict=True):
            drafting.acceptance.observe(int(guess == token), 1)
        self.lengths.observe_probe(time.perf_counter() - started if self._first_rows.was_prepared else 0.0)

    def _compare_rows(self, inputs: DraftInputs) -> Tensor:
        """fp32 logits of the rows that lead to known tokens, the last of them; the very last row leads to none."""
        return self._model.logits(self._layer(inputs, inputs.batch)[:-1][-_COMPARED:]).to(torch.float32)

    def _layer(self, inputs: DraftInputs, batch: Batch) -> Tensor:
        """[T, D]: what the layer makes of rows and their sources."""
        source_TD = embedding(inputs.source_index_T, self._cache.sources.flatten(0, 1))
        return self._model.draft_step(batch.token_ids_T, source_TD, batch)


def _lengths(model: CausalLM, max_draft_tokens: int) -> DraftLengths:
    """For the weights of a model, as they lie in memory."""
    config, mtp = model.config, model.mtp
    assert mtp is not None
    layers = [weight_bytes(layer) for layer in model.model.layers]
    experts = sum(weight_bytes(module) for module in model.model.layers.modules() if isinstance(module, Experts))
    of_mtp = sum(weight_bytes(module) for module in mtp.modules() if isinstance(module, Experts))
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 0.0
    head = model.lm_head.weight.nbytes
    return DraftLengths(
        max_draft_tokens,
        *step_shapes(
            other_bytes=sum(layers) - experts + head, expert_bytes=experts, num_experts=config.num_experts,
            top_k=config.num_experts_per_tok, mtp_bytes=int(weight_bytes(mtp) - of_mtp * (1 - share)) + head,
        ),
    )  # fmt: skip
