"""Which tokens of which requests run in the next step. Integers only, no torch.

Continuous batching: every running request that is past its prompt goes on in every step, and what is left of the
step's token budget reads prompts in chunks, in fair shares. Blocks are lent as a sequence grows; when they run out,
what is cached goes first, and then the youngest request: it waits, and later goes on from where it was.

Owners of requests share seats, blocks, slots and the budget of prompts: one alone may use all, and when others come,
what is above its share goes back to the queue and out of the cache (`shares.py`, `turns.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from qnext.engine.request import FinishReason, Request, RequestStatus
from qnext.engine.scheduling.admission import Admission
from qnext.engine.scheduling.apart import ApartSteps, touched
from qnext.engine.scheduling.archive import Archive
from qnext.engine.scheduling.blocks import RefPool
from qnext.engine.scheduling.copies import Copies
from qnext.engine.scheduling.keeper import Keeper
from qnext.engine.scheduling.loader import Loader
from qnext.engine.scheduling.prefix import PrefixCache
from qnext.engine.scheduling.shares import Shares
from qnext.engine.scheduling.turns import Turns
from qnext.engine.step import Limits, SequencePlan, StepPlan, StepResult, TokenEvent
from qnext.errors import DoesNotFit


class OwnerGauges(NamedTuple):
    """Requests of one owner, and what they and its cached prefixes hold."""

    num_running: int
    num_waiting: int
    num_parked: int
    num_blocks: int
    num_slots: int


class Scheduler:
    """First come, first served for each owner, but nobody computes what another is just computing. `plan`, then
    `commit` what came of it; one step at a time.

    `prefixes` is None where nothing is cached. A request that could never run even alone is refused by `add`; any
    other gets its turn. `archive` holds prefixes beyond the device's memory.
    """

    def __init__(
        self, limits: Limits, archive: Archive | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.blocks = RefPool(limits.num_blocks or 0, name="block")
        self.slots = RefPool(limits.num_slots, name="slot")
        spill_tokens = archive.chunk_tokens if archive is not None else 0
        self.prefixes = PrefixCache.of(limits, self.blocks, self.slots, spill_tokens=spill_tokens)
        self.loader = Loader(archive, self.prefixes) if archive is not None and self.prefixes is not None else None
        self.num_preemptions = 0
        self._turns = Turns(limits.max_num_seqs)
        self._running: list[Request] = []  # in the order of their admission
        self._parked: set[Request] = set()  # neither wait nor run until they are resumed
        self._shares = Shares(self.blocks, self.slots, self.prefixes, self._turns, self._running, clock)
        self._planned: set[Request] = set()  # those that have their place in the plan that is made
        self._in_flight: StepPlan | None = None
        self._copies = Copies(self.slots, self.prefixes)
        self._keeper: Keeper | None = None
        if self.prefixes is not None:
            spills = archive is not None and archive.saves_at_once
            self._keeper = Keeper(self.slots, self.prefixes, self._shares, self._copies, spills_at_once=spills)
        pools = (self.blocks, self.slots, self.prefixes, self.loader)
        self._admission = Admission(limits, *pools, self._turns, self._shares, self._running, self._copies)
        self._apart = ApartSteps()

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
        parked = Counter(request.owner for request in list(self._parked))
        return {
            owner: OwnerGauges(*(counts.get(owner, 0) for counts in (running, waiting, parked, blocks, slots)))
            for owner in sorted({*running, *waiting, *parked, *blocks, *slots})
        }

    @property
    def decoding(self) -> list[Request]:
        """Requests that have read their prompts and go on from their last token, in the order of their admission."""
        return [r for r in self._running if _num_unread(r) == 1]

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits or runs; what is parked does neither."""
        return bool(self._turns or self._running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises DoesNotFit when it could not run even alone."""
        needed = self.limits.blocks_of(request.max_cached_tokens)
        if needed > self.blocks.size:
            fits = self.blocks.size * self.limits.block_size
            raise DoesNotFit(
                f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones need "
                f"{request.max_cached_tokens} tokens of KV cache; {fits} would fit"
            )
        self._shares.note(request.owner)
        self._turns.append(request)

    def park(self, request: Request) -> None:
        """Take a request that has not ended from its seat, or its place in the queue, until `resume`."""
        assert self._in_flight is None, "a step is on its way"
        if request.status not in (RequestStatus.WAITING, RequestStatus.RUNNING):
            return
        if request.status is RequestStatus.RUNNING:
            self._preempt(request)
        self._turns.remove(request)
        request.status = RequestStatus.PARKED
        self._parked.add(request)

    def resume(self, request: Request) -> None:
        """It waits again, before all others of its owner."""
        if request in self._parked:
            self._parked.remove(request)
            request.status = RequestStatus.WAITING
            self._turns.put_back(request)

    # ---- one step ----

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do but to wait for a prefix. It may be copies alone."""
        assert self._in_flight is None, "the last plan was not committed"
        sequences: list[SequencePlan] = []
        self._planned.clear()
        self._make_way()
        num_preemptions = self.num_preemptions
        budget = self._plan_decoding(sequences, self.limits.max_num_batched_tokens)
        self._plan_prompts(sequences, budget, may_admit=num_preemptions == self.num_preemptions)
        sequences = self._apart.choose(sequences)
        loads = self.loader.drain_loads() if self.loader is not None else ()
        if not sequences and not self._copies.of_slots and not loads:
            is_fetching = self.loader is not None and self.loader.wait_a_moment()
            assert is_fetching or not self.has_unfinished, "requests wait, yet nothing can run"
            return None
        self._in_flight = StepPlan(
            tuple(sequences), self.blocks.drain_freed(), self.slots.drain_freed(), *self._copies.drain(), loads
        )
        return self._in_flight

    def commit(self, result: StepResult) -> list[TokenEvent]:
        """Book the step that was planned last. Requests aborted meanwhile get nothing."""
        plan = self._finish_plan()
        events: list[TokenEvent] = []
        for sequence in plan.sequences:
            request = sequence.request
            if request.finish_reason is not None:
                self._release(request)
                continue
            num_known = len(sequence.token_ids) - len(sequence.drafts)
            kept = 0
            if sequence.needs_sample:
                request.drafts = ()
                for token in result.tokens[request.id]:
                    kept += 1
                    request.finish_reason = request.append(token)
                    events.append(TokenEvent(request.id, token, request.finish_reason))
                    if request.finish_reason is not None:
                        break
            request.num_computed_tokens += num_known + max(0, kept - 1)
            if request.num_computed_tokens > request.num_furthest_tokens:
                request.num_furthest_tokens = request.num_computed_tokens
                request.num_turn_steps += 1
            if self._keeper is not None:
                self._keeper.keep(request)
            if request.finish_reason is not None:
                self._release(request, is_cached=True)
        return events

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request at once, in whatever phase; what it holds is free before the next plan."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.status in (RequestStatus.WAITING, RequestStatus.PARKED):
            (self._turns if request.status is RequestStatus.WAITING else self._parked).remove(request)
            request.status, request.fetch = RequestStatus.FINISHED, None
            self._shares.note(request.owner)
        elif self._in_flight is None or all(s.request is not request for s in self._in_flight.sequences):
            self._release(request)

    def discard_step(self, *, requeues: bool = False) -> list[Request]:
        """The planned step failed midway: abort all whose caches are spoiled, or have them wait again; return them."""
        plan = self._finish_plan()
        requests = touched(plan, self._running)
        if self.prefixes is not None:
            # These states may not have been copied; all other copies were for requests of this step.
            self.prefixes.forget(target for _, target in plan.slot_copies)
        self.blocks.free_again(plan.freed_blocks)
        self.slots.free_again(plan.freed_slots)
        for request in reversed(requests):
            if not requeues:
                request.finish_reason = request.finish_reason or "abort"
            if request.finish_reason is None:
                self._requeue(request, is_cached=False)
            else:
                self._release(request)
        if self.prefixes is not None and plan.loads:
            # Nor may what was to be loaded have come. Now that nobody holds its blocks they go with it.
            self.prefixes.forget(load.slot for load in plan.loads if load.slot is not None)
            if any(load.slot is None for load in plan.loads):
                self.prefixes.clear()  # no checkpoint says which blocks these are
        return requests

    def check_integrity(self) -> None:
        """No block or slot is lost or doubled, or held by what neither runs nor is cached."""
        self.blocks.check_integrity(self._block_owners())
        self.slots.check_integrity(self._slot_owners())
        if self.prefixes is not None:
            self.prefixes.check_integrity()
        assert len(self._running) <= self.limits.max_num_seqs
        for request in self._running:
            assert request.status is RequestStatus.RUNNING and request.slot is not None
            assert len(request.blocks) >= self.limits.blocks_of(request.num_computed_tokens)
            assert len(request.blocks) <= self.limits.blocks_of(request.max_cached_tokens)
        self._turns.check_integrity(self._running)
        assert all(not r.blocks and r.slot is None for r in (*self._turns, *self._parked))

    # ---- parts of a plan; each returns what is left of the budget ----

    def _plan_decoding(self, sequences: list[SequencePlan], budget: int) -> int:
        """The last token of every request that has read its prompt, and what was drafted to follow it."""
        decoding = self.decoding
        if len(self.blocks.holdings.held) > 1:  # who holds too much comes last, for it may have to make room
            decoding.sort(key=lambda request: self.blocks.holdings.excess(request.owner) > 0)
        for n, request in enumerate(decoding):
            if request.status is not RequestStatus.RUNNING:
                continue  # it had to make room for an older one
            spare = budget - (len(decoding) - n)
            most = min(self.limits.max_draft_tokens, spare, request.max_cached_tokens - request.num_tokens)
            drafts = request.drafts[: max(0, most)]
            if drafts and not self._shares.make_room(
                self._num_missing(request, request.num_tokens + len(drafts)), 0, request.owner, reach="share"
            ):
                drafts = ()
            if request.flight is not None:
                request.flight.num_planned = request.num_tokens  # the last token of a prompt
            if self._grow(request, request.num_tokens + len(drafts)):
                self._put(SequencePlan.of(request, request.num_tokens, drafts), sequences)
                budget -= 1 + len(drafts)
        return budget

    def _plan_prompts(self, sequences: list[SequencePlan], budget: int, *, may_admit: bool) -> None:
        """Chunks of prompts: an equal part of the budget for each owner, and one for requests from the queue. What one
        does not need is the others'."""
        reading: dict[str, list[Request]] = {}
        for request in self._running:
            if _num_unread(request) > 1:
                reading.setdefault(request.owner, []).append(request)
        first = self._admission.first() if may_admit else None
        if len(reading) + (first is not None and first.owner not in reading) < 2:
            (own,) = reading.values() or ([],)
            self._plan_reading(own, sequences, budget, admits=first is not None)
            return
        unread = {owner: sum(map(_num_unread, own)) for owner, own in reading.items()}
        owners: list[str | None] = [*sorted(unread, key=unread.__getitem__)]
        if first is not None and first.owner not in reading:
            owners.insert(-1, None)  # for the queue; who has most to read has what the others leave
        if budget < len(owners) * self.limits.chunk_size:  # not all get a chunk in this step: who had none for longest
            owners.sort(
                key=lambda owner: self._turns.last_read(first.owner if owner is None and first else owner or "")
            )
        for num_left, owner in zip(range(len(owners), 0, -1), owners, strict=True):
            part = budget if num_left == 1 else min(budget, max(budget // num_left, self.limits.chunk_size))
            if owner is None:
                budget += self._plan_admissions(sequences, part) - part
            else:
                admits = first is not None and first.owner == owner
                budget += self._plan_reading(reading[owner], sequences, part, admits=admits) - part

    def _plan_reading(self, reading: list[Request], sequences: list[SequencePlan], budget: int, *, admits: bool) -> int:
        """Prompts of one owner. The oldest has half of the budget, so that it comes to an end; of the others the
        shortest go first, and half of what they could take is for new ones. What nobody needs is the oldest's."""
        reserve = 0
        if reading and (admits or len(reading) > 1):
            reserve = max(budget // 2, min(budget, self.limits.chunk_size))
        rest = budget - reserve
        for request in sorted(reading[1:], key=_num_unread):
            rest -= self._plan_chunk(request, rest // 2 if admits else rest, sequences)
        if admits:
            rest = self._plan_admissions(sequences, rest)
        if reading:
            rest -= self._plan_chunk(reading[0], reserve + rest, sequences) - reserve
        return rest

    def _plan_admissions(self, sequences: list[SequencePlan], budget: int) -> int:
        """Requests from the queue, in turn; those that wait for another's prefix let others pass."""
        passed: list[Request] = []
        while (request := self._admission.first()) is not None:
            if self._chunk_end(request, 0, budget) == 0:
                break
            if self._admission.must_wait(request) or self._admission.must_fetch(request):
                self._turns.remove(request)
                passed.append(request)
                continue
            if not self._admission.admit(request):
                continue
            for other in islice(self._turns.waiting_of(request.owner), self.limits.max_num_seqs):
                # Before the chunk is planned: it should end where another's prompt parts.
                self._admission.must_wait(other, request.flight)
            budget -= self._plan_chunk(request, budget, sequences)
        for request in reversed(passed):
            self._turns.put_back(request)
        return budget

    def _make_way(self) -> None:
        """Where an owner waits that has less than its share, the newest request of one that has more goes back."""
        victim = self._admission.who_yields()
        if victim is not None:
            self._preempt(victim)

    def _plan_chunk(self, request: Request, budget: int, sequences: list[SequencePlan]) -> int:
        start = request.num_computed_tokens
        end = self._chunk_end(request, start, budget)
        if not end:
            return 0
        if request.flight is not None:
            request.flight.num_planned = end
        self._put(SequencePlan.of(request, end, ()), sequences)
        self._turns.note_read(request.owner)
        return end - start

    def _put(self, sequence: SequencePlan, sequences: list[SequencePlan]) -> None:
        sequences.append(sequence)
        self._planned.add(sequence.request)

    def _chunk_end(self, request: Request, start: int, budget: int) -> int:
        """Where the next chunk of the prompt ends; 0 when the budget is too small for one."""
        end = min(request.num_tokens, start + budget)
        if end < request.num_tokens:
            end -= end % self.limits.chunk_size
        if request.flight is not None and request.flight.next_stop is not None:
            end = min(end, request.flight.next_stop)
        return end if end > start else 0

    # ---- room ----

    def _num_missing(self, request: Request, num_tokens: int) -> int:
        return max(0, self.limits.blocks_of(num_tokens) - len(request.blocks))

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Lend blocks for so many tokens. Others make room, of whoever holds most; False where the request itself
        had to."""
        missing = self._num_missing(request, num_tokens)
        if not missing:
            return True
        while not self._shares.make_room(missing, 0, request.owner, reach="idle"):
            victim = self._shares.yields_blocks(request, self._planned)
            is_only = victim is request and self._turns.num_running(request.owner) == 1
            if is_only and self._shares.make_room(missing, 0, request.owner, reach="all"):
                break
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks.extend(self.blocks.allocate(missing, request.owner))
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue. Its state stays in the cache as long as there is room."""
        self.num_preemptions += 1
        self._requeue(request, is_cached=True)

    def _requeue(self, request: Request, *, is_cached: bool) -> None:
        self._give_back(request, is_cached=is_cached)
        request.num_computed_tokens, request.drafts = 0, ()
        request.was_looked_up = False
        request.status = RequestStatus.WAITING
        self._turns.put_back(request)

    # ---- what stays, what goes ----

    def _release(self, request: Request, *, is_cached: bool = False) -> None:
        self._give_back(request, is_cached=is_cached)
        request.status = RequestStatus.FINISHED
        self._shares.note(request.owner)

    def _give_back(self, request: Request, *, is_cached: bool) -> None:
        if self._keeper is not None:
            if is_cached:
                self._keeper.keep_all(request)
            self._keeper.land(request)
        self._running.remove(request)
        self._turns.end(request)
        self.blocks.free(request.blocks)
        assert request.slot is not None
        self.slots.free([request.slot])
        request.blocks, request.slot = [], None

    def _finish_plan(self) -> StepPlan:
        """The plan that is over; its copies were made, so nobody holds their ends any more."""
        assert self._in_flight is not None, "there is no plan to commit"
        plan, self._in_flight = self._in_flight, None
        self._copies.release()
        if self.loader is not None:
            self.loader.release()
        return plan

    def _block_owners(self) -> Iterator[int]:
        for request in self._running:
            yield from request.blocks
        if self.prefixes is not None:
            yield from self.prefixes.owned_blocks()
        yield from self._copies.held_blocks()
        yield from self.loader.held_blocks if self.loader is not None else ()

    def _slot_owners(self) -> Iterator[int]:
        yield from (request.slot for request in self._running if request.slot is not None)
        if self.prefixes is not None:
            yield from self.prefixes.owned_slots()
        yield from self._copies.held_slots()
        yield from self.loader.held_slots if self.loader is not None else ()


def _num_unread(request: Request) -> int:
    """Tokens that are still to be computed; 1 where only the last is, which chooses the next."""
    return request.num_tokens - request.num_computed_tokens
