"""Which tokens of which requests run in the next step. Integers only, no torch.

Continuous batching: `planner.py` spends the budget of a step. Blocks are lent as a sequence grows; when they run out,
what is cached goes first, and then the youngest request: it waits, and later goes on from where it was.

Owners of requests share seats, blocks, slots and the budget of prompts: one alone may use all, and when others come,
what is above its share goes back to the queue and out of the cache (`shares.py`, `turns.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from qnext.engine.policy.archive import Archive
from qnext.engine.policy.planner import Drafts, Planner
from qnext.engine.policy.prefix import PrefixCache
from qnext.engine.policy.prefix_node import Spill
from qnext.engine.policy.recovery import Recovery
from qnext.engine.policy.request import FinishReason, Request
from qnext.engine.policy.resources import Resources
from qnext.engine.policy.seats import Seats
from qnext.engine.policy.sequence import Sequence, Status
from qnext.engine.policy.step import EngineLimits, StepPlan, StepResult, TokenEvent
from qnext.errors import DoesNotFit

_NO_DRAFTS: Drafts = {}


class OwnerGauges(NamedTuple):
    """Requests of one owner, and what they and its cached prefixes hold, here and in the tiers beyond."""

    num_running: int
    num_waiting: int
    num_parked: int
    num_blocks: int
    num_slots: int
    host_bytes: int
    disk_bytes: int


class Scheduler:
    """First come, first served for each owner, but nobody computes what another is just computing. `plan`, then
    `commit` what came of it; one step at a time.

    A request that could never run even alone is refused by `add`; any other gets its turn. `archive` holds prefixes
    beyond the device's memory.
    """

    def __init__(
        self, limits: EngineLimits, archive: Archive | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._resources = Resources.of(limits, archive, clock)
        self.limits, self.blocks, self.slots, self._turns, self._running, self._shares, self.sharing = self._resources
        self._seats = Seats(self._resources)
        self._planner = Planner(self._resources, self._seats)
        self.recovery = Recovery()
        self.sequences: dict[str, Sequence] = {}  # of the requests that have not ended, by their ids
        self._parked: set[Sequence] = set()  # neither wait nor run until they are resumed
        self._in_flight: StepPlan | None = None
        self._accepted: list[tuple[int, int]] = []  # slots and numbers of tokens, for the next plan

    @property
    def prefixes(self) -> PrefixCache | None:
        """None where nothing is cached."""
        return self.sharing.prefixes

    @property
    def num_preemptions(self) -> int:
        return self._seats.num_preemptions

    @property
    def num_waiting(self) -> int:
        return len(self._turns)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def num_waiting_of(self, owner: str) -> int:
        return len(self._turns.waiting_of(owner))

    def by_owner(self) -> dict[str, OwnerGauges]:
        """What each owner that has or wants anything holds by now. Any thread may ask."""
        running, waiting = dict(self._turns.seats.held), self._turns.num_waiting_by_owner()
        blocks, slots = dict(self.blocks.holdings.held), dict(self.slots.holdings.held)
        parked = Counter(sequence.owner for sequence in list(self._parked))
        found: dict[str, OwnerGauges] = {}
        for owner in sorted({*running, *waiting, *parked, *blocks, *slots}):
            host_bytes, disk_bytes = self.sharing.held_bytes(owner)
            found[owner] = OwnerGauges(
                num_running=running.get(owner, 0),
                num_waiting=waiting.get(owner, 0),
                num_parked=parked.get(owner, 0),
                num_blocks=blocks.get(owner, 0),
                num_slots=slots.get(owner, 0),
                host_bytes=host_bytes,
                disk_bytes=disk_bytes,
            )
        return found

    @property
    def decoding(self) -> list[Sequence]:
        """Requests that have read their prompts and go on from their last token, in the order of their admission."""
        return self._planner.decoding()

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits or runs; what is parked does neither."""
        return bool(self._turns or self._running)

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises DoesNotFit when it could not run even alone."""
        needed = self.limits.blocks_of(request.max_cached_tokens)
        if needed > self.blocks.size:
            fits = self.blocks.size * self.limits.block_size
            raise DoesNotFit(
                f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones need "
                f"{request.max_cached_tokens} tokens of KV cache; {fits} would fit"
            )
        sequence = self.sequences[request.id] = Sequence(request)
        self._shares.note(request.owner)
        self._turns.append(sequence)
        return sequence

    def park(self, request_id: str) -> None:
        """Take a request from its seat, or its place in the queue, until `resume`. One that has ended is ignored."""
        assert self._in_flight is None, "a step is on its way"
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.status not in (Status.WAITING, Status.RUNNING):
            return
        if sequence.status is Status.RUNNING:
            self._seats.preempt(sequence)
        self._turns.remove(sequence)
        sequence.status = Status.PARKED
        self._parked.add(sequence)

    def resume(self, request_id: str) -> None:
        """It waits again, before all others of its owner."""
        sequence = self.sequences.get(request_id)
        if sequence is not None and sequence in self._parked:
            self._parked.remove(sequence)
            sequence.status = Status.WAITING
            self._turns.put_back(sequence)

    # ---- one step ----

    def plan(self, drafts: Drafts = _NO_DRAFTS) -> StepPlan | None:
        """The next step, or None when there is nothing to do but to wait for a prefix. It may be copies alone.

        `drafts` are tokens that may follow the last one of a request, to be verified in this step as far as there is
        room.
        """
        assert self._in_flight is None, "the last plan was not committed"
        chunks = self.recovery.choose(self._planner.plan(drafts))
        if not chunks and not self.sharing.has_work:
            is_fetching = self.sharing.wait_a_moment()
            assert is_fetching or not self.has_unfinished, "requests wait, yet nothing can run"
            return None
        self._in_flight = StepPlan(
            tuple(chunk.plan() for chunk in chunks),
            self.blocks.drain_freed(),
            self.slots.drain_freed(),
            *self.sharing.drain(),
            *self._drain_saved(),
        )
        return self._in_flight

    def plan_saving(self) -> StepPlan | None:
        """What is to be saved now, between two steps; not to be committed."""
        if not self.sharing.has_spills:
            return None
        accepted, spills = self._drain_saved()
        return StepPlan(accepted=accepted, spills=spills)

    def plan_end(self) -> list[StepPlan]:
        """When all requests have ended and no step will follow: copies that were to be made with the next one, and all
        that is cached, what is worth most last."""
        if not self.sharing.is_archived:
            return []
        plan = self.plan()
        if plan is not None:
            self.commit(StepResult({}))
        accepted, spills = self._drain_saved()
        last = StepPlan(accepted=accepted, spills=(*spills, *self.sharing.everything()))
        return [last] if plan is None else [plan, last]

    def _drain_saved(self) -> tuple[tuple[tuple[int, int], ...], tuple[Spill, ...]]:
        """What belongs to sequences since the last plan, and prefixes that are to be kept elsewhere."""
        accepted, self._accepted = tuple(self._accepted), []
        return accepted, tuple(self.sharing.drain_spills())

    def commit(self, result: StepResult) -> list[TokenEvent]:
        """Book the step that was planned last. Requests aborted meanwhile get nothing."""
        plan = self._finish_plan()
        events: list[TokenEvent] = []
        for planned in plan.sequences:
            sequence = self.sequences[planned.request_id]
            request = sequence.request
            if planned.num_drafts:
                self._accepted.append((planned.slot, len(result.tokens[request.id])))
            if request.finish_reason is not None:
                self._release(sequence)
                continue
            kept = 0
            if planned.needs_sample:
                for token in result.tokens[request.id]:
                    kept += 1
                    request.finish_reason = request.append(token)
                    events.append(TokenEvent(request.id, token, request.finish_reason))
                    if request.finish_reason is not None:
                        break
            sequence.num_computed_tokens += len(planned.token_ids) - planned.num_drafts + max(0, kept - 1)
            if sequence.num_computed_tokens > sequence.num_furthest_tokens:
                sequence.num_furthest_tokens = sequence.num_computed_tokens
                sequence.num_turn_steps += 1
            self.sharing.keep(sequence)
            if request.finish_reason is not None:
                self._release(sequence, is_cached=True)
        return events

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request at once, in whatever phase; what it holds is free before the next plan."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.request.finish_reason is not None:
            return
        sequence.request.finish_reason = reason
        if sequence.status in (Status.WAITING, Status.PARKED):
            (self._turns if sequence.status is Status.WAITING else self._parked).remove(sequence)
            sequence.fetch = None
            self._end(sequence)
        elif self._in_flight is None or all(s.request_id != request_id for s in self._in_flight.sequences):
            self._release(sequence)

    def discard_step(self, *, requeues: bool = False) -> list[Request]:
        """The planned step failed midway: abort all whose caches are spoiled, or have them wait again; return them.

        Beside the step's requests these are all that were admitted and have not run: the copies of their prefixes were
        to be made with this step.
        """
        plan = self._finish_plan()
        planned = {s.request_id for s in plan.sequences}
        touched = [s for s in self._running if s.id in planned or s.num_computed_tokens == s.num_reused_tokens]
        self.sharing.forget_copies(plan)
        self.blocks.free_again(plan.freed_blocks)
        self.slots.free_again(plan.freed_slots)
        for sequence in reversed(touched):
            if not requeues:
                sequence.request.finish_reason = sequence.request.finish_reason or "abort"
            if sequence.request.finish_reason is None:
                self._seats.requeue(sequence, is_cached=False)
            else:
                self._release(sequence)
        self.sharing.forget_loads(plan)
        return [sequence.request for sequence in touched]

    def retry_step(self) -> str | None:
        """The planned step failed by somebody's fault: all wait again, and run apart until it is known whose. Returns
        the id of the request whose fault it surely was."""
        assert self._in_flight is not None, "there is no step to be tried again"
        planned = self._in_flight.sequences
        most = {s.request_id: self.sequences[s.request_id].max_cached_tokens for s in planned}
        self.discard_step(requeues=True)
        culprit = self.recovery.blame(planned, most.__getitem__)
        for request_id in most.keys() - self.sequences.keys():  # it was aborted meanwhile
            self.recovery.forget(request_id)
        return culprit

    def check_integrity(self) -> None:
        """No block or slot is lost or doubled, and every request is where its status says."""
        self._resources.check_integrity()
        assert len(self._running) <= self.limits.max_num_seqs
        for sequence in self._running:
            assert sequence.status is Status.RUNNING and sequence.slot is not None
            assert len(sequence.blocks) >= self.limits.blocks_of(sequence.num_computed_tokens)
            assert len(sequence.blocks) <= self.limits.blocks_of(sequence.max_cached_tokens)
        self._turns.check_integrity(self._running)
        idle = (*self._turns, *self._parked)
        assert all(not s.blocks and s.slot is None for s in idle)
        assert {s.id for s in (*self._running, *idle)} == self.sequences.keys()

    def _release(self, sequence: Sequence, *, is_cached: bool = False) -> None:
        self._seats.vacate(sequence, is_cached=is_cached)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.status = Status.FINISHED
        del self.sequences[sequence.id]
        self.recovery.forget(sequence.id)
        self._shares.note(sequence.owner)

    def _finish_plan(self) -> StepPlan:
        """The plan that is over; its copies were made, so nobody holds their ends any more."""
        assert self._in_flight is not None, "there is no plan to commit"
        plan, self._in_flight = self._in_flight, None
        self.sharing.end_step()
        return plan
