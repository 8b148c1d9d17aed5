"""Which tokens of which requests run in the next step. Integers only, no torch.

Continuous batching: every running request that is past its prompt goes on in every step, and what is left of the
step's token budget reads prompts in chunks, in fair shares. Blocks are lent as a sequence grows; when they run out,
what is cached goes first, and then the youngest request: it waits, and later goes on from where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from qnext.engine.request import FinishReason, Request, RequestStatus
from qnext.engine.scheduling.archive import Archive
from qnext.engine.scheduling.blocks import RefPool
from qnext.engine.scheduling.flights import Flight
from qnext.engine.scheduling.loader import Loader
from qnext.engine.scheduling.prefix import Hit, PrefixCache
from qnext.engine.scheduling.turns import Turns, touched
from qnext.engine.step import Limits, SequencePlan, StepPlan, StepResult, TokenEvent
from qnext.errors import DoesNotFit

_NO_HIT = Hit(0, (), None, None)


class Scheduler:
    """First come, first served, but nobody computes what another is just computing. `plan`, then `commit` what came of
    it; one step at a time.

    `prefixes` is None where nothing is cached. A request that could never run even alone is refused by `add`; any
    other gets its turn. `archive` holds prefixes beyond the device's memory.
    """

    def __init__(self, limits: Limits, archive: Archive | None = None) -> None:
        self.limits = limits
        self.blocks = RefPool(limits.num_blocks or 0, name="block")
        self.slots = RefPool(limits.num_slots, name="slot")
        spill_tokens = archive.chunk_tokens if archive is not None else 0
        self.prefixes = PrefixCache.of(limits, self.blocks, self.slots, spill_tokens=spill_tokens)
        self.loader = Loader(archive, self.prefixes) if archive is not None and self.prefixes is not None else None
        self._spills_at_once = archive is not None and archive.saves_at_once
        self.num_preemptions = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order of their admission
        self._in_flight: StepPlan | None = None
        self._slot_copies: list[tuple[int, int]] = []
        self._block_copies: list[tuple[int, int]] = []
        self._sources: list[Hit] = []  # what the copies read, held until they were made
        self._held_slots: list[int] = []
        self._turns = Turns()
        self._blocked: tuple[Request, tuple[object, ...]] | None = None  # who found no room, and as things were

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def decoding(self) -> list[Request]:
        """Requests that have read their prompts and go on from their last token, in the order of their admission."""
        return [r for r in self._running if r.num_tokens - r.num_computed_tokens == 1]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises DoesNotFit when it could not run even alone."""
        needed = self._num_blocks(request.max_cached_tokens)
        if needed > self.blocks.size:
            fits = self.blocks.size * self.limits.block_size
            raise DoesNotFit(
                f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones need "
                f"{request.max_cached_tokens} tokens of KV cache; {fits} would fit"
            )
        self._waiting.append(request)

    # ---- one step ----

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do but to wait for a prefix. It may be copies alone."""
        assert self._in_flight is None, "the last plan was not committed"
        sequences: list[SequencePlan] = []
        num_preemptions = self.num_preemptions
        budget = self._plan_decoding(sequences, self.limits.max_num_batched_tokens)
        self._plan_prompts(sequences, budget, may_admit=num_preemptions == self.num_preemptions)
        sequences = self._turns.choose(sequences)
        loads = self.loader.drain_loads() if self.loader is not None else ()
        if not sequences and not self._slot_copies and not loads:
            is_fetching = self.loader is not None and self.loader.wait_a_moment()
            assert is_fetching or not self.has_unfinished, "requests wait, yet nothing can run"
            return None
        self._in_flight = StepPlan(
            tuple(sequences), self.blocks.drain_freed(), self.slots.drain_freed(), tuple(self._block_copies),
            tuple(self._slot_copies), loads,
        )  # fmt: skip
        self._block_copies, self._slot_copies = [], []
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
            self._keep_prefix(request)
            if request.finish_reason is not None:
                self._cache_all(request)
                self._release(request)
        return events

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request at once, in whatever phase; what it holds is free before the next plan."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
            request.status, request.fetch = RequestStatus.FINISHED, None
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
            (self._requeue if request.finish_reason is None else self._release)(request)
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
            assert len(request.blocks) >= self._num_blocks(request.num_computed_tokens)
            assert len(request.blocks) <= self._num_blocks(request.max_cached_tokens)
        assert all(not request.blocks and request.slot is None for request in self._waiting)

    # ---- parts of a plan; each returns what is left of the budget ----

    def _plan_decoding(self, sequences: list[SequencePlan], budget: int) -> int:
        """The last token of every request that has read its prompt, and what was drafted to follow it."""
        decoding = self.decoding
        for n, request in enumerate(decoding):
            if request.status is not RequestStatus.RUNNING:
                continue  # it had to make room for an older one
            spare = budget - (len(decoding) - n)
            most = min(self.limits.max_draft_tokens, spare, request.max_cached_tokens - request.num_tokens)
            drafts = request.drafts[: max(0, most)]
            if drafts and not self._make_room(self._num_missing(request, request.num_tokens + len(drafts)), 0):
                drafts = ()
            if request.flight is not None:
                request.flight.num_planned = request.num_tokens  # the last token of a prompt
            if self._grow(request, request.num_tokens + len(drafts)):
                sequences.append(SequencePlan.of(request, request.num_tokens, drafts))
                budget -= 1 + len(drafts)
        return budget

    def _plan_prompts(self, sequences: list[SequencePlan], budget: int, *, may_admit: bool) -> None:
        """Chunks of prompts. The oldest has half of the budget, so that it comes to an end; of the others the shortest
        go first, and half of what they could take is for new ones. What nobody needs is the oldest's."""
        reading = [r for r in self._running if r.num_tokens - r.num_computed_tokens > 1]
        admits = may_admit and bool(self._waiting) and len(self._running) < self.limits.max_num_seqs
        reserve = 0
        if reading and (admits or len(reading) > 1):
            reserve = max(budget // 2, min(budget, self.limits.chunk_size))
        rest = budget - reserve
        for request in sorted(reading[1:], key=lambda r: r.num_tokens - r.num_computed_tokens):
            rest -= self._plan_chunk(request, rest // 2 if admits else rest, sequences)
        if admits:
            rest = self._plan_admissions(sequences, rest)
        if reading:
            self._plan_chunk(reading[0], reserve + rest, sequences)

    def _plan_admissions(self, sequences: list[SequencePlan], budget: int) -> int:
        """Requests from the queue, in order; those that wait for another's prefix let others pass."""
        passed: list[Request] = []
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            request = self._waiting[0]
            if self._chunk_end(request, 0, budget) == 0:
                break
            if self._blocked == (request, self._version()):
                break
            if self._must_wait(request) or self._must_fetch(request):
                passed.append(self._waiting.popleft())
                continue
            if not self._admit(request):
                self._blocked = (request, self._version())
                break
            for other in islice(self._waiting, self.limits.max_num_seqs):
                # Before the chunk is planned: it should end where another's prompt parts.
                self._must_wait(other, request.flight)
            budget -= self._plan_chunk(request, budget, sequences)
        self._waiting.extendleft(reversed(passed))
        return budget

    def _plan_chunk(self, request: Request, budget: int, sequences: list[SequencePlan]) -> int:
        start = request.num_computed_tokens
        end = self._chunk_end(request, start, budget)
        if not end:
            return 0
        if request.flight is not None:
            request.flight.num_planned = end
        sequences.append(SequencePlan.of(request, end, ()))
        return end - start

    def _chunk_end(self, request: Request, start: int, budget: int) -> int:
        """Where the next chunk of the prompt ends; 0 when the budget is too small for one."""
        end = min(request.num_tokens, start + budget)
        if end < request.num_tokens:
            end -= end % self.limits.chunk_size
        if request.flight is not None and request.flight.next_stop is not None:
            end = min(end, request.flight.next_stop)
        return end if end > start else 0

    # ---- room ----

    def _num_blocks(self, num_tokens: int) -> int:
        return 0 if self.limits.num_blocks is None else -(-num_tokens // self.limits.block_size)

    def _num_missing(self, request: Request, num_tokens: int) -> int:
        return max(0, self._num_blocks(num_tokens) - len(request.blocks))

    def _make_room(self, num_blocks: int, num_slots: int) -> bool:
        """Whether so much is free, after evicting from the cache where that helps."""
        blocks, slots = num_blocks - self.blocks.num_free, num_slots - self.slots.num_free
        if (blocks > 0 or slots > 0) and self.prefixes is not None:
            self.prefixes.evict(num_blocks=max(0, blocks), num_slots=max(0, slots))
        return num_blocks <= self.blocks.num_free and num_slots <= self.slots.num_free

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Lend blocks for so many tokens. Younger requests make room; False where the request itself had to."""
        missing = self._num_missing(request, num_tokens)
        while not self._make_room(missing, 0):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks.extend(self.blocks.allocate(missing))
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue. Its state stays in the cache as long as there is room."""
        self.num_preemptions += 1
        self._cache_all(request)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._give_back(request)
        request.num_computed_tokens, request.drafts = 0, ()
        request.was_looked_up = False
        request.status = RequestStatus.WAITING
        self._waiting.appendleft(request)

    def _version(self) -> tuple[object, ...]:
        """Another one when somebody let go of blocks or slots, or a prompt is on its way that another might wait for.

        Without either, a request that found no room finds none. What is newly cached does not count: where it would
        save a request much, that request waits for it.
        """
        newest = self._running[-1].id if self._running else ""
        return self.blocks.num_releases, self.slots.num_releases, newest

    def _must_wait(self, request: Request, flight: Flight | None = None) -> bool:
        """Whether another computes just now what this one needs; asks all, or only the one whose `flight` is given."""
        if self.prefixes is None or request.max_hit_tokens < request.num_tokens - 1:
            return False
        if request.wait is None or not request.wait.is_open:
            tokens = request.token_range(0, request.num_tokens)
            request.wait = self.prefixes.wait(
                tokens, salt=request.salt, limit=len(tokens) - 1, flights=None if flight is None else (flight,)
            )
        return request.wait is not None and request.wait.is_open

    def _must_fetch(self, request: Request) -> bool:
        if self.loader is None or (request.was_looked_up and request.fetch is None):
            return False
        tokens = request.token_range(0, request.num_tokens)
        return self.loader.must_wait(request, tokens, limit=request.max_hit_tokens)

    def _admit(self, request: Request) -> bool:
        """Lend a slot and the blocks of all known tokens, those of a cached prefix among them."""
        tokens = request.token_range(0, request.num_tokens)
        hit = _NO_HIT
        if self.loader is not None:
            spare = len(self._running)
            self.loader.place(request, tokens, has_room=lambda b, s: self._make_room(b and b + spare, s))
        if self.prefixes is not None:
            hit = self.prefixes.acquire(tokens, salt=request.salt, limit=request.max_hit_tokens)
            if hit.num_tokens and not self._has_room_for(len(tokens), hit):
                # What is to be copied takes room too: without it there may be enough.
                self.prefixes.release(hit)
                hit = _NO_HIT
        if not self._has_room_for(len(tokens), hit):
            return False
        self._waiting.popleft()
        self._running.append(request)
        request.status, request.wait, request.fetch = RequestStatus.RUNNING, None, None
        request.blocks = [*hit.blocks, *self.blocks.allocate(self._num_blocks(len(tokens)) - len(hit.blocks))]
        (request.slot,) = self.slots.allocate(1)
        request.num_computed_tokens = request.num_reused_tokens = hit.num_tokens
        request.num_admissions += 1
        if self.prefixes is not None:
            interval = self.limits.checkpoint_interval
            stops = range(interval, len(tokens), interval) if interval else ()
            request.flight = self.prefixes.announce(tokens, salt=request.salt, hit=hit, stops=stops)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = hit.num_tokens
            self._sources.append(hit)
            if hit.slot is not None:
                self._slot_copies.append((hit.slot, request.slot))
            if hit.tail_block is not None:
                self._block_copies.append((hit.tail_block, request.blocks[len(hit.blocks)]))
        return True

    def _has_room_for(self, num_tokens: int, hit: Hit) -> bool:
        """A new sequence needs its blocks, and one more for each other that runs, lest it be sent back at once."""
        spare = len(self._running) if self.limits.num_blocks is not None else 0
        return self._make_room(self._num_blocks(num_tokens) - len(hit.blocks) + spare, 1)

    # ---- what stays, what goes ----

    def _keep_prefix(self, request: Request) -> None:
        """After a step: cache what the prompt has come to, where others may go on from."""
        flight = request.flight
        if flight is None or self.prefixes is None or request.slot is None:
            return
        flight.num_computed = min(request.num_computed_tokens, len(flight.tokens))
        if self.prefixes.slots is None:
            self.prefixes.insert(flight.tokens, request.blocks, salt=request.salt, flight=flight)
        elif flight.is_at_stop and self._make_room(0, 1):
            (slot,) = self.slots.allocate(1)
            # Both ends are held until the copy was made, at the start of the next step.
            self.slots.share([request.slot])
            self._held_slots += [request.slot, slot]
            self._slot_copies.append((request.slot, slot))
            if self._spills_at_once:
                tokens = flight.tokens[: flight.num_computed]
                self.prefixes.note_spill(tokens, request.blocks, salt=request.salt, slot=request.slot)
            is_shared = flight.stops[flight.num_computed]
            self.prefixes.add_checkpoint(
                flight.tokens, request.blocks, salt=request.salt, slot=slot, is_shared=is_shared, flight=flight
            )
        if request.num_computed_tokens >= len(flight.tokens):
            self._land(request)

    def _cache_all(self, request: Request) -> None:
        """Share all that a request has computed, its slot too: no copy, for it is about to let go of that."""
        if self.prefixes is None or request.slot is None:
            return
        tokens = request.token_range(0, request.num_computed_tokens)
        if self._spills_at_once:
            self.prefixes.note_spill(tokens, request.blocks, salt=request.salt, slot=request.slot)
        if self.prefixes.slots is None:
            self.prefixes.insert(tokens, request.blocks, salt=request.salt)
        elif len(tokens) >= self.prefixes.min_tokens:
            self.prefixes.add_checkpoint(tokens, request.blocks, salt=request.salt, slot=request.slot)

    def _land(self, request: Request) -> None:
        if request.flight is not None and self.prefixes is not None:
            self.prefixes.land(request.flight)
            request.flight = None

    def _release(self, request: Request) -> None:
        self._give_back(request)
        request.status = RequestStatus.FINISHED

    def _give_back(self, request: Request) -> None:
        self._land(request)
        self._running.remove(request)
        self.blocks.free(request.blocks)
        assert request.slot is not None
        self.slots.free([request.slot])
        request.blocks, request.slot = [], None

    def _finish_plan(self) -> StepPlan:
        """The plan that is over; its copies were made, so nobody holds their ends any more."""
        assert self._in_flight is not None, "there is no plan to commit"
        plan, self._in_flight = self._in_flight, None
        if self.prefixes is not None:
            for hit in self._sources:
                self.prefixes.release_sources(hit)
        self.slots.free(self._held_slots)
        self._sources, self._held_slots = [], []
        if self.loader is not None:
            self.loader.release()
        return plan

    def _block_owners(self) -> Iterator[int]:
        for request in self._running:
            yield from request.blocks
        if self.prefixes is not None:
            yield from self.prefixes.owned_blocks()
        yield from (hit.tail_block for hit in self._sources if hit.tail_block is not None)
        yield from self.loader.held_blocks if self.loader is not None else ()

    def _slot_owners(self) -> Iterator[int]:
        yield from (request.slot for request in self._running if request.slot is not None)
        if self.prefixes is not None:
            yield from self.prefixes.owned_slots()
        yield from (hit.slot for hit in self._sources if hit.slot is not None)
        yield from self._held_slots
        yield from self.loader.held_slots if self.loader is not None else ()
