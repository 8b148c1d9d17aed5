"""Which tokens of which requests run in the next step. Integers only, no torch.

Continuous batching: every running request that is past its prompt advances by one token in every step, and what is
left of the step's token budget reads prompts in chunks. A request is admitted when the pools hold all that it can
ever need, so nothing that runs can run out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qnext.engine.blocks import IdPool
from qnext.engine.request import FinishReason, Request, RequestStatus, SampledToken
from qnext.errors import DoesNotFit, UsageError


@dataclass(frozen=True)
class Limits:
    """Sizes that bound a scheduler.

    A prompt chunk that is not the prompt's last ends at a multiple of `chunk_size` tokens, the grid on which the
    delta rule works. `num_blocks` is None for a model without full attention, which needs no blocks.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int | None
    num_slots: int
    chunk_size: int

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise UsageError(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        least = self.max_num_seqs - 1 + self.chunk_size
        if self.max_num_batched_tokens < least:
            raise UsageError(
                f"max_num_batched_tokens must be at least max_num_seqs - 1 + {self.chunk_size} = {least}, "
                f"not {self.max_num_batched_tokens}: a prompt would starve beside running requests"
            )


class SequencePlan(NamedTuple):
    """The tokens of one request in a step: positions `start` to `start + len(token_ids)`."""

    request: Request
    token_ids: tuple[int, ...]
    start: int
    needs_sample: bool  # the last token of the step is the last known one: its logits choose the next


class StepPlan(NamedTuple):
    sequences: tuple[SequencePlan, ...]
    freed_blocks: tuple[int, ...]  # given back since the last step; nothing of them may be read again
    freed_slots: tuple[int, ...]


class StepResult(NamedTuple):
    """The chosen token of every sequence of the plan that needed one, by request id."""

    tokens: Mapping[str, SampledToken]


class TokenEvent(NamedTuple):
    """A request got a token. With finish_reason "stop" the token is the stop token itself."""

    request_id: str
    token: SampledToken
    finish_reason: FinishReason | None


class Scheduler:
    """First come, first served. `plan`, then `commit` what came of it; one step at a time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = IdPool(limits.num_blocks or 0, name="block")
        self.slots = IdPool(limits.num_slots, name="slot")
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._in_flight: StepPlan | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def blocks_needed(self, request: Request) -> int:
        if self.limits.num_blocks is None:
            return 0
        return -(-request.max_cached_tokens // self.limits.block_size)

    def add(self, request: Request) -> None:
        """Queue a request. Raises DoesNotFit when it could not run even alone."""
        needed = self.blocks_needed(request)
        if needed > self.blocks.size:
            fits = self.blocks.size * self.limits.block_size
            raise DoesNotFit(
                f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones need "
                f"{request.max_cached_tokens} tokens of KV cache; {fits} would fit"
            )
        self._waiting.append(request)

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do."""
        assert self._in_flight is None, "the last plan was not committed"
        budget = self.limits.max_num_batched_tokens
        sequences: list[SequencePlan] = []
        reading: list[Request] = []
        for request in self._running:
            if request.num_tokens - request.num_computed_tokens == 1:
                sequences.append(_sequence_plan(request, request.num_tokens))
                budget -= 1
            else:
                reading.append(request)
        for request in reading:
            budget -= self._plan_chunk(request, budget, sequences)
        while self._waiting and self._can_admit(self._waiting[0]) and self._chunk_end(self._waiting[0], budget):
            request = self._admit()
            budget -= self._plan_chunk(request, budget, sequences)
        if not sequences:
            assert not self.has_unfinished, "requests wait, yet nothing can run"
            return None
        self._in_flight = StepPlan(tuple(sequences), self.blocks.drain_freed(), self.slots.drain_freed())
        return self._in_flight

    def commit(self, result: StepResult) -> list[TokenEvent]:
        """Book the step that was planned last. Requests aborted meanwhile get nothing."""
        assert self._in_flight is not None, "there is no plan to commit"
        plan, self._in_flight = self._in_flight, None
        events: list[TokenEvent] = []
        for sequence in plan.sequences:
            request = sequence.request
            if request.finish_reason is not None:
                self._release(request)
                continue
            request.num_computed_tokens += len(sequence.token_ids)
            if sequence.needs_sample:
                token = result.tokens[request.id]
                reason = request.append(token)
                if reason is not None:
                    request.finish_reason = reason
                    self._release(request)
                events.append(TokenEvent(request.id, token, reason))
        return events

    def abort(self, request: Request) -> None:
        """End a request at once, in whatever phase; what it holds is free before the next plan."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "abort"
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
            request.status = RequestStatus.FINISHED
        elif self._in_flight is None or all(s.request is not request for s in self._in_flight.sequences):
            self._release(request)

    def discard_step(self) -> list[Request]:
        """The planned step failed midway: abort its requests, whose caches are spoiled, and return them."""
        assert self._in_flight is not None
        plan, self._in_flight = self._in_flight, None
        requests = [sequence.request for sequence in plan.sequences]
        for request in requests:
            request.finish_reason = request.finish_reason or "abort"
            self._release(request)
        return requests

    def check_integrity(self) -> None:
        """No block or slot is lost, doubled or held by a request that does not run."""
        self.blocks.check_integrity(block for request in self._running for block in request.blocks)
        self.slots.check_integrity(request.slot for request in self._running if request.slot is not None)
        assert len(self._running) <= self.limits.max_num_seqs
        for request in self._running:
            assert request.status is RequestStatus.RUNNING and request.slot is not None
            assert len(request.blocks) == self.blocks_needed(request)
        assert all(not request.blocks and request.slot is None for request in self._waiting)

    def _can_admit(self, request: Request) -> bool:
        return (
            len(self._running) < self.limits.max_num_seqs
            and self.slots.num_free > 0
            and self.blocks_needed(request) <= self.blocks.num_free
        )

    def _admit(self) -> Request:
        request = self._waiting.popleft()
        request.blocks = self.blocks.allocate(self.blocks_needed(request))
        (request.slot,) = self.slots.allocate(1)
        request.status = RequestStatus.RUNNING
        self._running.append(request)
        return request

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        self.blocks.free(request.blocks)
        assert request.slot is not None
        self.slots.free([request.slot])
        request.blocks, request.slot, request.status = [], None, RequestStatus.FINISHED

    def _chunk_end(self, request: Request, budget: int) -> int:
        """Where the next chunk of the prompt ends; 0 when the budget is too small for one."""
        end = min(request.num_tokens, request.num_computed_tokens + budget)
        if end < request.num_tokens:
            end -= end % self.limits.chunk_size
        return end if end > request.num_computed_tokens else 0

    def _plan_chunk(self, request: Request, budget: int, sequences: list[SequencePlan]) -> int:
        end = self._chunk_end(request, budget)
        if not end:
            return 0
        sequences.append(_sequence_plan(request, end))
        return end - request.num_computed_tokens


def _sequence_plan(request: Request, end: int) -> SequencePlan:
    start = request.num_computed_tokens
    return SequencePlan(request, request.token_range(start, end), start, needs_sample=end == request.num_tokens)
