"""The MTP layer at work: what the next tokens may be.

Row p of the layer reads the trunk's row of position p and the token at p + 1, and leads to the token at p + 2. Its
keys and values lie in pages of their own beside those of the trunk. They need not reach back to the start of the
sequence: a request that has not drafted for a while, or that found its prefix in the cache, begins with the rows that
are kept of the last positions. Tokens that are drafted one after another take the layer's own result for the trunk's
row that is not there yet. Whatever comes out, `verify` decides what the answer is: this is about speed alone.

Legend: N sequences, T rows, D hidden, Y vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.engine.cache import NUM_SOURCES, Cache
from qnext.engine.memory import weight_bytes
from qnext.engine.recorded import ModelWatch, RecordedBatches, Rows, StepInputs
from qnext.engine.request import Request
from qnext.engine.sampling.sampler import Verdict, Window, draft
from qnext.engine.speculation.draft_lengths import Drafting, DraftLengths, step_shapes
from qnext.model import CausalLM
from qnext.model.moe import Experts
from qnext.ops import embedding, put_rows

DEFAULT_DRAFT_TOKENS = 3
_PROBE_ROWS = 32  # read by a probe, the second half of them compared with what came
_STEPS_BETWEEN = 4  # two looks at the lengths


class Drafter:
    """Proposes tokens for the requests of one engine, as many as pay.

    `draft` goes before a step, `learn` after it. Between the two the request's `drafts` are verified.
    """

    def __init__(self, model: CausalLM, cache: Cache, watch: ModelWatch, *, max_draft_tokens: int) -> None:
        self._model, self._cache, self._watch = model, cache, watch
        self.lengths = _lengths(model, max_draft_tokens)
        self._next_tokens = RecordedBatches(cache, watch, self._draft_rows)
        self._chosen_for: list[int] = []  # requests; the choice holds for some steps
        self._wanted: list[int] | None = None
        self._num_steps = 0

    # ---- before a step ----

    @torch.inference_mode()
    def draft(self, requests: Sequence[Request]) -> None:
        """Set `drafts` of these requests, all of which go on from their last token."""
        if not requests:
            return
        self._num_steps += 1
        ids = [id(request) for request in requests]
        if ids == self._chosen_for and self._num_steps % _STEPS_BETWEEN and not self.lengths.may_probe:
            if self._wanted is not None:
                self._propose(requests, self._wanted)
            return
        draftings = [self._drafting_of(request) for request in requests]
        wanted = self._choose(requests, draftings)
        idle = [n for n, length in enumerate(wanted) if not length]
        if idle and self.lengths.may_probe and self._probe(idle, requests, draftings):
            wanted = self._choose(requests, draftings)
        self._chosen_for, self._wanted = ids, wanted if any(wanted) else None
        if self._wanted is not None:
            self._propose(requests, self._wanted)

    def learn(self, windows: Sequence[Window], verdicts: Sequence[Verdict], *, seconds: float | None) -> None:
        """What became of the drafts of a step, which took so long if that is a measure for others."""
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
        most = [self._most(request, drafting) for request, drafting in zip(requests, draftings, strict=True)]
        return self.lengths.choose(draftings, most)

    def _most(self, request: Request, drafting: Drafting) -> int:
        """How many tokens can be drafted: none before there is a row to begin with, and only what blocks are lent for.

        The last of k drafts is written nowhere; the others take the k - 1 positions after the last row.
        """
        if self._first_row(request, drafting) >= request.num_computed_tokens:
            return 0
        block_size = self._cache.block_size
        lent = len(request.blocks) * block_size - request.num_computed_tokens + 1
        return min(lent, request.max_cached_tokens - request.num_tokens)

    def _first_row(self, request: Request, drafting: Drafting) -> int:
        """Where the layer's keys and values begin: at the start of a page, so that a table can point there."""
        end = request.num_computed_tokens
        kept_from = max(request.num_reused_tokens, end - (NUM_SOURCES - self.lengths.max_draft_tokens))
        if drafting.num_rows >= kept_from and drafting.num_rows > drafting.first_row:
            return drafting.first_row
        block_size = self._cache.block_size
        return -(-kept_from // block_size) * block_size

    def _rows(self, request: Request, drafting: Drafting) -> Rows:
        """The rows that are missing up to the last position that the trunk has computed. At least one."""
        first, end = self._first_row(request, drafting), request.num_computed_tokens
        if first != drafting.first_row or drafting.num_rows <= first:
            drafting.first_row = drafting.num_rows = first
        start = min(drafting.num_rows, end - 1)
        drafting.num_rows = end
        return self._rows_at(request, drafting, request.token_range(start + 1, end + 1), start)

    def _rows_at(self, request: Request, drafting: Drafting, token_ids: Sequence[int], start: int) -> Rows:
        return Rows(request, token_ids, start, first_page=drafting.first_row // self._cache.block_size)

    # ---- passes of the layer ----

    def _propose(self, requests: Sequence[Request], wanted: Sequence[int]) -> None:
        drafts: list[list[int]] = [[] for _ in requests]
        draftings = [self._drafting_of(request) for request in requests]
        most = [min(length, self._most(r, d)) for length, r, d in zip(wanted, requests, draftings, strict=True)]
        active = [n for n, length in enumerate(most) if length]
        rows = [self._rows(requests[n], draftings[n]) for n in active]
        self._watch.look()
        while active:
            start = time.perf_counter()
            logits_NY = self._next_tokens.run(rows)
            indices = [len(requests[n].output_ids) + len(drafts[n]) for n in active]
            for n, token in zip(active, draft(logits_NY, [requests[n] for n in active], indices), strict=True):
                drafts[n].append(token)
            if self._next_tokens.was_prepared:
                self.lengths.passes.observe(len(active), time.perf_counter() - start)
            active = [n for n in active if len(drafts[n]) < most[n]]
            rows = [
                self._rows_at(
                    requests[n], draftings[n], drafts[n][-1:], requests[n].num_computed_tokens + len(drafts[n]) - 1
                )
                for n in active
            ]
        for request, tokens in zip(requests, drafts, strict=True):
            request.drafts = tuple(tokens)

    def _draft_rows(self, inputs: StepInputs) -> Tensor:
        """fp32 logits [N, Y] of the last row of each sequence. Its result is kept as the source of the next one."""
        hidden_TD = self._layer(inputs)
        is_last = hidden_TD.shape[0] == len(inputs.last_rows_N)
        last_ND = hidden_TD if is_last else embedding(inputs.last_rows_N, hidden_TD)
        put_rows(last_ND, inputs.next_source_index_N, self._cache.sources.flatten(0, 1))
        return self._model.logits(last_ND).to(torch.float32)

    def _probe(self, indices: Sequence[int], requests: Sequence[Request], draftings: Sequence[Drafting]) -> bool:
        """What would have been drafted for tokens that are known by now? Asks that of one of some requests, the one
        that was asked least lately, and says whether any could be asked.

        Costs a pass of the layer and no step. The layer's keys and values begin anew with it.
        """
        block_size = self._cache.block_size
        able = [n for n in indices if requests[n].num_computed_tokens - requests[n].num_reused_tokens >= 2 * block_size]
        if not able:
            return False
        chosen = min(able, key=lambda n: draftings[n].last_probe)
        request, drafting = requests[chosen], draftings[chosen]
        started = time.perf_counter()
        end = request.num_computed_tokens
        first = -(-max(request.num_reused_tokens, end - _PROBE_ROWS) // block_size) * block_size
        drafting.first_row, drafting.num_rows, drafting.last_probe = first, end, self._num_steps
        inputs = StepInputs(self._cache, [end - first])
        inputs.fill([self._rows_at(request, drafting, request.token_range(first + 1, end + 1), first)])
        # The last row leads to a token that is not known yet.
        hidden_RD = self._layer(inputs)[:-1][-(_PROBE_ROWS // 2) :]
        known = request.token_range(end + 1 - len(hidden_RD), end + 1)
        first_index = end + 1 - len(hidden_RD) - len(request.prompt_ids)
        guesses = draft(
            self._model.logits(hidden_RD).to(torch.float32), [request] * len(known),
            [max(0, first_index + i) for i in range(len(known))],
        )  # fmt: skip
        for guess, token in zip(guesses, known, strict=True):
            drafting.acceptance.observe(int(guess == token), 1)
        self.lengths.observe_probe(time.perf_counter() - started)
        return True

    def _layer(self, inputs: StepInputs) -> Tensor:
        """[T, D]: what the layer makes of rows and their sources."""
        batch = inputs.batch
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
