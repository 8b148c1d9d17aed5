"""Random requests keep every rule of a plan, lose nothing, and cost the same however long they are."""

from __future__ import annotations

import gc
import random
import statistics
from collections import Counter, deque
from functools import partial

import pytest

from qnext.engine.policy.blocks import IdPool
from qnext.engine.policy.request import Request, SampledToken
from qnext.engine.policy.scheduler import Scheduler
from qnext.engine.policy.step import SequencePlan, StepPlan, StepResult
from tests.engine.schedules import CHUNK, answer, limits, request, spans, step
from tests.pace import seconds_of


def counted(scheduler: Scheduler, name: str) -> list[None]:
    """Grows by one with every call of this method of the prefix cache."""
    calls: list[None] = []
    method = getattr(scheduler.prefixes, name)

    def count(*args: object, **kwargs: object) -> object:
        calls.append(None)
        return method(*args, **kwargs)

    setattr(scheduler.prefixes, name, count)
    return calls


@pytest.mark.parametrize("has_states", [True, False])
def test_a_request_without_room_is_tried_again_only_when_something_was_released(has_states: bool) -> None:
    scheduler = Scheduler(limits(num_blocks=110, num_slots=20, has_prefix_cache=True, has_states=has_states))
    scheduler.add(request("cached", 500, 1, first=50_000))
    step(scheduler)
    long, brief = request("long", 50, 1600), request("brief", 50, 700, first=5000)
    blocked, behind = request("blocked", 1250, 5, first=9000), request("behind", 5, 5, first=20_000)
    for one in (long, brief):
        scheduler.add(one)
    while not (long.output_ids and brief.output_ids and len(long.output_ids) > 300):
        step(scheduler)
    scheduler.add(blocked)
    scheduler.add(behind)
    step(scheduler)
    lookups, evictions = counted(scheduler, "lookup"), counted(scheduler, "evict")
    version = scheduler.blocks.num_releases
    for _ in range(350):
        step(scheduler)
        assert scheduler.sequences["blocked"].num_computed_tokens == 0
    assert not lookups and len(evictions) <= 2 * (350 // 16 + 1), "but for what the running ones need"
    assert scheduler.blocks.num_releases == version
    while brief.finish_reason is None:
        step(scheduler)
    assert not lookups
    step(scheduler)
    assert lookups, "something was released"
    while long.finish_reason is None:
        step(scheduler)
    assert spans(step(scheduler))[0][0] == "blocked", "before the one behind it"
    while scheduler.has_unfinished:
        step(scheduler)
    assert len(blocked.output_ids) == len(behind.output_ids) == 5


def test_a_queue_is_not_looked_up_again_and_again() -> None:
    scheduler = Scheduler(limits(has_prefix_cache=True, num_slots=20, max_num_seqs=8, num_blocks=100))
    lookups = counted(scheduler, "lookup")
    for n in range(300):
        scheduler.add(request(str(n), 20, 3, first=1000 * n))
    while scheduler.has_unfinished:
        step(scheduler)
    assert 300 <= len(lookups) <= 330, "one for each, and few more where there was no room"


def test_a_step_costs_the_same_in_the_middle_of_a_long_prompt() -> None:
    """In 16 tokens of a prompt of 262,144, a copy of what is computed or a walk over it would take a hundred times as
    long as all that is needed: then late steps take longer than early ones."""
    for has_states in (True, False):
        scheduler = Scheduler(
            limits(
                num_blocks=17_000,
                num_slots=30,
                has_prefix_cache=True,
                has_states=has_states,
                checkpoint_interval=4096,
                chunk_size=1,
                max_num_batched_tokens=2064,
                max_num_seqs=17,
            )
        )
        for n in range(16):
            scheduler.add(request(str(n), 20, 400, first=1000 * n))
        step_unchecked(scheduler)
        long = request("long", 262_144, 2, first=100_000)
        scheduler.add(long)
        spent = []
        while len(long.output_ids) == 0:
            spent.append(seconds_of(partial(step_unchecked, scheduler)))
        assert 126 < len(spent) < 200
        early, late = (statistics.median(part) for part in (spent[4:34], spent[-34:-4]))
        assert late < 3 * early, "128 blocks are noted, and 16 requests go on"
        scheduler.check_integrity()


def step_unchecked(scheduler: Scheduler) -> None:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(answer(plan))


def random_traffic(seed: int, num_requests: int) -> None:
    rng = random.Random(seed)
    max_num_seqs = rng.randint(1, 9)
    bounds = limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs - 1 + CHUNK + rng.randint(0, 300),
        num_blocks=rng.randint(21, 60) if seed % 5 else None,
        num_slots=max_num_seqs + rng.choice((0, 1, 10)),
        chunk_size=rng.choice((1, CHUNK)),
        has_states=bool(seed % 4) or not seed % 5,
        has_prefix_cache=bool(seed % 3),
        checkpoint_interval=rng.choice((0, 70)),
        min_prefix_tokens=rng.choice((1, 64)),
    )
    scheduler = Scheduler(bounds)
    recent: deque[Request] = deque()
    unfinished: list[Request] = []
    reasons: Counter[str | None] = Counter()
    num_added = 0
    while num_added < num_requests or scheduler.has_unfinished or scheduler.num_parked:
        for _ in range(rng.randint(0, 3) if num_added < num_requests else 0):
            length, first = rng.randint(1, 20 * 16 - 30), rng.choice((0, 0, 1000, 10_000 * rng.randint(1, 99)))
            one = request(str(num_added), length, rng.randint(1, 30), stop=5, first=first)
            one.owner = rng.choice("abb")
            one.salt = one.owner + rng.choice(("", "2"))
            scheduler.add(one)
            recent.append(one)
            if len(recent) > 20:
                scheduler.resume(recent.popleft().id)
            unfinished.append(one)
            num_added += 1
        if recent and rng.random() < 0.15:
            scheduler.abort(rng.choice(list(recent)[-12:]).id)
            scheduler.check_integrity()
        drafts: dict[str, tuple[int, ...]] = {}
        for r in recent:
            if rng.random() < 0.02:
                scheduler.park(r.id)
            if rng.random() < 0.1 or not scheduler.has_unfinished:
                scheduler.resume(r.id)
            if r.output_ids and r.finish_reason is None:
                drafts[r.id] = tuple(rng.randint(0, 40) for _ in range(rng.randint(0, 4)))
        plan = scheduler.plan(drafts)
        if plan is None:
            assert not scheduler.has_unfinished
            continue
        check_plan(plan, scheduler)
        if rng.random() < 0.05 and plan.sequences:
            scheduler.abort(rng.choice(plan.sequences).request_id)
        if rng.random() < 0.02:
            requeues = rng.random() < 0.7
            failed = scheduler.discard_step(requeues=requeues)
            for r in failed if requeues and rng.random() < 0.8 else ():
                if r.finish_reason is None:
                    scheduler.recovery.set_apart(r.id, until=rng.randint(1, r.num_tokens + 5))
        else:
            scheduler.commit(StepResult({s.request_id: window(rng, s) for s in plan.sequences if s.needs_sample}))
        scheduler.check_integrity()
        for r in unfinished:
            check_end(r)
        reasons.update(r.finish_reason for r in unfinished if r.finish_reason is not None)
        unfinished = [r for r in unfinished if r.finish_reason is None]
    if scheduler.prefixes is not None:
        scheduler.prefixes.clear()
    scheduler.plan()  # copies that are left, and then nothing
    if scheduler._in_flight is not None:
        scheduler.commit(StepResult({}))
    assert scheduler.blocks.num_used == scheduler.slots.num_used == 0
    reasons.update(r.finish_reason for r in unfinished)
    assert reasons.keys() == {"stop", "length", "abort"} and reasons.total() == num_added


def check_end(r: Request) -> None:
    assert r.finish_reason != "length" or len(r.output_ids) == r.max_tokens
    assert r.finish_reason != "stop" or (r.output_ids[-1] == 5 and 5 not in r.output_ids[:-1])


def window(rng: random.Random, sequence: SequencePlan) -> list[SampledToken]:
    right = rng.randint(0, len(sequence.drafts))
    return [SampledToken(t) for t in (*sequence.drafts[:right], rng.randint(0, 40))]


def check_plan(plan: StepPlan, scheduler: Scheduler) -> None:
    """Within the budget, every request once, in blocks of its own, from where it is."""
    bounds = scheduler.limits
    assert sum(len(s.token_ids) for s in plan.sequences) <= bounds.max_num_batched_tokens
    assert plan.sequences or plan.slot_copies
    assert len({s.request_id for s in plan.sequences}) == len(plan.sequences)
    assert len({s.slot for s in plan.sequences}) == len(plan.sequences)
    written: list[int] = []
    for s in plan.sequences:
        end = s.start + len(s.token_ids)
        held = scheduler.sequences[s.request_id]
        assert (s.slot, s.start) == (held.slot, held.num_computed_tokens) and end > s.start
        assert s.needs_sample or end % bounds.chunk_size == 0
        assert s.token_ids == held.token_range(s.start, end - s.num_drafts) + s.drafts
        assert list(s.blocks) == held.blocks[s.first_block :]
        if bounds.num_blocks is not None:
            assert end <= len(held.blocks) * bounds.block_size
            written += held.blocks[s.start // bounds.block_size : -(-end // bounds.block_size)]
    assert len(set(written)) == len(written), "two requests write to one block"


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(seed: int) -> None:
    """Hundreds of requests each, arriving, finishing and aborted at random; checked after every step."""
    random_traffic(seed, 200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 24))
def test_much_random_traffic(seed: int) -> None:
    random_traffic(seed, 10_000)


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """What ten times as many requests leave behind is no more than what a few leave."""
    left = []
    for num_requests in (300, 300, 3000):
        random_traffic(13, num_requests)
        gc.collect()
        left.append(len(gc.get_objects()))
    assert left[2] - left[1] < 200, left


def test_the_pool_notices_wrong_bookkeeping() -> None:
    pool = IdPool(4, name="block")
    ids = pool.allocate(3)
    pool.check_integrity(ids)
    for owned in (ids[:2], [*ids, ids[0]], [*ids[:2], 3]):
        with pytest.raises(AssertionError):
            pool.check_integrity(owned)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    pool.free(ids[:1])
    with pytest.raises(AssertionError):
        pool.free(ids[:1])
    assert pool.drain_freed() == (ids[0],) and pool.drain_freed() == ()
