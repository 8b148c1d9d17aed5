"""What the next tokens may be: which requests draft, how many tokens, and from which rows of the MTP layer.

The keys and values of the layer need not reach back to the start of the sequence: a request that has not drafted for a
while, or that has just read its prompt, begins with the rows that are kept of the last positions. Whatever comes out,
`verify` decides what the answer is: this is about speed alone. The tensors are `execution/draft_passes.py`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from qnext.engine.execution.executor import Executor
from qnext.engine.policy.draft_lengths import Drafting, DraftLengths, step_shapes
from qnext.engine.policy.planner import Drafts
from qnext.engine.policy.request import Request
from qnext.engine.policy.sequence import Sequence
from qnext.engine.policy.step import DraftPlan, Rows
from qnext.engine.sampling.sampler import Verdict, Window, draft
from qnext.errors import ends_engine

_log = logging.getLogger("qnext.engine")

_FIRST_ROWS = 32  # with which a request begins to draft
_LONG_GAP = 16  # rows that are made up for, at most
_STEPS_BETWEEN, _STEPS_OF_REST = 4, 32  # two looks at the lengths, while drafting and while not


class Proposer(Protocol):
    """What drafts tokens for an engine. Answers do not depend on it."""

    def draft(self, sequences: Iterable[Sequence]) -> Drafts:
        """Before a step: what may follow the last tokens of these sequences, by request id."""

    def learn(self, windows: list[Window], verdicts: list[Verdict], *, seconds: float | None) -> None:
        """After it: what became of that. The step took so long, if that is a measure for others."""


class Drafter:
    """Proposes tokens for the requests of one engine, as many as pay.

    `draft` goes before a step, `learn` after it. Between the two the drafts are verified.
    """

    def __init__(self, executor: Executor, *, max_draft_tokens: int) -> None:
        assert executor.draft_costs is not None, "the executor drafts nothing"
        self._executor = executor
        self.lengths = DraftLengths(max_draft_tokens, *step_shapes(executor.draft_costs))
        self._table: WeakKeyDictionary[Request, Drafting] = WeakKeyDictionary()
        self._barred: WeakSet[Request] = WeakSet()  # whose drafts could not be made
        self._num_steps = 0
        self._next_look = 0
        self._num_requests = 0  # the choice holds for so many, and for some steps
        self._wanted: list[int] | None = None

    # ---- before a step ----

    def draft(self, sequences: Iterable[Sequence]) -> Drafts:
        """Tokens that may follow the last ones of these sequences, all of which go on from there, by request id.

        Whose drafts cannot be made, goes on without any. Raises what ends the engine.
        """
        able = [sequence for sequence in sequences if sequence.request not in self._barred]
        try:
            return self.propose(able)
        except Exception as error:
            if ends_engine(error):
                raise
            _log.exception("drafts for %d requests failed", len(able))
        for sequence in able:
            self._table.pop(sequence.request, None)
        drafts: dict[str, tuple[int, ...]] = {}
        for sequence in able:
            try:
                drafts |= self.propose([sequence])
            except Exception as error:
                if ends_engine(error):
                    raise
                _log.exception("request %s goes on without drafts", sequence.id)
                self._table.pop(sequence.request, None)
                self._barred.add(sequence.request)
        return drafts

    def propose(self, sequences: list[Sequence]) -> dict[str, tuple[int, ...]]:
        """The same, all together; no first token is kept waiting. Raises what the model raises."""
        self._num_steps += 1
        sequences = [sequence for sequence in sequences if sequence.request.output_ids]
        if self._num_steps >= self._next_look or len(sequences) != self._num_requests:
            self._look(sequences)
        return {} if self._wanted is None else self._propose(sequences, self._wanted)

    def _look(self, sequences: list[Sequence]) -> None:
        """Choose lengths anew, after a probe where one is due."""
        draftings = [self.drafting_of(sequence) for sequence in sequences]
        wanted = self._choose(sequences, draftings)
        idle = [n for n, length in enumerate(wanted) if not length and _can_begin(sequences[n])]
        if idle:
            n = min(idle, key=lambda n: draftings[n].last_probe)
            num_left = _num_left(sequences[n])
            if self.lengths.may_probe(draftings[n], num_left=num_left, num_sequences=len(sequences)):
                self._begin(sequences[n], draftings[n])
                wanted = self._choose(sequences, draftings)
        self._num_requests = len(sequences)
        self._wanted = wanted if any(wanted) else None
        self._next_look = self._num_steps + (_STEPS_OF_REST if self._wanted is None else _STEPS_BETWEEN)

    # ---- after a step ----

    def learn(self, windows: list[Window], verdicts: list[Verdict], *, seconds: float | None) -> None:
        """What became of the drafts of a step, which took so long if that is a measure for others."""
        if self._wanted is None:
            if seconds is not None:
                self.lengths.observe_step(len(windows), seconds)
            return
        if seconds is not None:
            self.lengths.observe_step(sum(1 + len(window.draft_ids) for window in windows), seconds)
        for window, verdict in zip(windows, verdicts, strict=True):
            drafting = self._table.get(window.request)
            if window.draft_ids and drafting is not None:
                # A request that ends says nothing of the drafts after its end.
                pairs = list(zip(window.draft_ids, verdict.tokens, strict=False))
                num_right = sum(drafted == token.token_id for drafted, token in pairs)
                drafting.acceptance.observe(num_right, len(pairs))

    # ---- where the layer's keys and values begin, and what it can read ----

    def drafting_of(self, sequence: Sequence) -> Drafting:
        """What is known of the drafts of a request."""
        drafting = self._table.get(sequence.request)
        if drafting is None:
            drafting = self._table[sequence.request] = self.lengths.new_request()
        if drafting.admission != sequence.num_admissions:
            drafting.admission, drafting.first_row, drafting.num_rows = sequence.num_admissions, 0, 0
        return drafting

    def _choose(self, sequences: list[Sequence], draftings: list[Drafting]) -> list[int]:
        most = [_num_left(sequence) if _can_begin(sequence) else 0 for sequence in sequences]
        return self.lengths.choose(draftings, most)

    # ---- passes of the layer ----

    def _propose(self, sequences: list[Sequence], wanted: list[int]) -> dict[str, tuple[int, ...]]:
        """All requests go through the layer, those that want few drafts, or none, as well: so their rows stay complete,
        and there are few sizes of batches."""
        most = [min(k, _num_left(sequence)) for k, sequence in zip(wanted, sequences, strict=True)]
        able = [n for n, sequence in enumerate(sequences) if _can_begin(sequence)]
        depth = max((most[n] for n in able), default=0)
        if depth <= 0:
            return {}
        chosen = [sequences[n] for n in able]
        start = time.perf_counter()
        rows = self._missing_rows(chosen)
        if all(sequence.request.params.is_greedy and sequence.request.marks is None for sequence in chosen):
            drafts, _, was_prepared = self._executor.draft(DraftPlan("chain", rows, depth))
        else:
            drafts, was_prepared = self._draft_one_by_one(chosen, rows, depth)
        if was_prepared:
            self.lengths.passes.observe(len(chosen), (time.perf_counter() - start) / depth)
        return {sequences[n].id: tuple(tokens[: max(0, most[n])]) for n, tokens in zip(able, drafts, strict=True)}

    def _draft_one_by_one(
        self, sequences: list[Sequence], rows: tuple[Rows, ...], depth: int
    ) -> tuple[list[list[int]], bool]:
        """Draws as `verify` will draw, with its numbers. Also whether the last pass was prepared."""
        requests = [sequence.request for sequence in sequences]
        drafts: list[list[int]] = [[] for _ in requests]
        was_prepared = False
        for done in range(depth):
            _, logits_NY, was_prepared = self._executor.draft(DraftPlan("next", rows, goes_on=done > 0))
            indices = [len(request.output_ids) + done for request in requests]
            for tokens, token in zip(drafts, draft(logits_NY, requests, indices, drafts), strict=True):
                tokens.append(token)
            rows = tuple(
                Rows(part.slot, (tokens[-1],), part.start + len(part.token_ids), base=part.base)
                for part, tokens in zip(rows, drafts, strict=True)
            )
        return drafts, was_prepared

    def _missing_rows(self, sequences: list[Sequence]) -> tuple[Rows, ...]:
        """The rows up to the last position that the trunk has computed, at least one of each request.

        As many of each, as far as they are there, though some are computed again: so there are few sizes of batches.
        """
        most = 1 + self.lengths.max_draft_tokens
        for sequence in sequences:
            drafting = self.drafting_of(sequence)
            gap = sequence.num_computed_tokens - drafting.num_rows
            if gap > _LONG_GAP or drafting.num_rows <= drafting.first_row:
                self._begin(sequence, drafting)
            elif gap > most:
                most = _LONG_GAP
        rows = []
        for sequence in sequences:
            drafting = self.drafting_of(sequence)
            end = drafting.num_rows = sequence.num_computed_tokens
            start = max(drafting.first_row, end - most)
            rows.append(_rows(sequence, start, end, base=drafting.first_row))
        return tuple(rows)

    def _begin(self, sequence: Sequence, drafting: Drafting) -> None:
        """Compute the rows of the last positions anew, and see what the layer would have drafted for tokens that are
        known by now. Costs a pass of the layer and no step."""
        started = time.perf_counter()
        request, end = sequence.request, sequence.num_computed_tokens
        first = max(sequence.num_reused_tokens, end - _FIRST_ROWS)
        drafting.first_row, drafting.num_rows, drafting.last_probe = first, end, self._num_steps
        rows = _rows(sequence, first, end, base=first)
        recurs = end - first == _FIRST_ROWS
        _, logits_RY, was_prepared = self._executor.draft(DraftPlan("known", (rows,), recurs=recurs))
        known = request.token_range(end + 1 - len(logits_RY), end + 1)
        first_index = end + 1 - len(known) - len(request.prompt_ids)
        indices = [max(0, first_index + i) for i in range(len(known))]
        for guess, token in zip(draft(logits_RY, [request] * len(known), indices), known, strict=True):
            drafting.acceptance.observe(int(guess == token), 1)
        self.lengths.observe_probe(time.perf_counter() - started if was_prepared else 0.0)


def _can_begin(sequence: Sequence) -> bool:
    """Whether there is more than the one row that every step has."""
    return sequence.num_computed_tokens - sequence.num_reused_tokens > 1


def _num_left(sequence: Sequence) -> int:
    """Tokens that its answer may still get, but the last."""
    return sequence.max_cached_tokens - sequence.num_tokens


def _rows(sequence: Sequence, start: int, end: int, *, base: int) -> Rows:
    """Rows `start` to `end` of the layer: each reads the token behind its own."""
    assert sequence.slot is not None
    return Rows(sequence.slot, sequence.token_range(start + 1, end + 1), start, base=base)
