"""Policy over integers: what runs when, and that nothing is ever lost."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter, deque

import pytest

from qnext.engine.request import Request, SampledToken, SamplingParams
from qnext.engine.scheduling.blocks import IdPool
from qnext.engine.scheduling.scheduler import Scheduler
from qnext.engine.step import Limits, SequencePlan, StepPlan, StepResult
from qnext.errors import DoesNotFit, UsageError

CHUNK = 64


def limits(**changes: float | None) -> Limits:
    values: dict[str, float | None] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 200, "block_size": 16, "num_blocks": 40, "num_slots": 4,
        "chunk_size": CHUNK, "max_draft_tokens": 4,
    }  # fmt: skip
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def request(name: str, num_prompt: int, max_tokens: int, *, stop: int = -1, first: int = 0) -> Request:
    prompt = tuple(range(first, first + num_prompt))
    return Request(name, prompt, SamplingParams(), seed=0, max_tokens=max_tokens, stop_ids=frozenset({stop}))


def answer(plan: StepPlan, token_id: int = 7) -> StepResult:
    return StepResult({s.request.id: (SampledToken(token_id),) for s in plan.sequences if s.needs_sample})


def step(scheduler: Scheduler, token_id: int = 7) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(answer(plan, token_id))
    scheduler.check_integrity()
    return plan


def spans(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(s.request.id, s.start, s.start + len(s.token_ids), s.needs_sample) for s in plan.sequences]


def test_a_prompt_is_read_on_the_chunk_grid() -> None:
    scheduler = Scheduler(limits(max_num_batched_tokens=100))
    scheduler.add(request("a", 150, 2))
    assert spans(step(scheduler)) == [("a", 0, 64, False)]
    assert spans(step(scheduler)) == [("a", 64, 150, True)]
    assert spans(step(scheduler)) == [("a", 150, 151, True)]
    assert scheduler.plan() is None


def test_decoding_goes_on_while_a_prompt_is_read() -> None:
    scheduler = Scheduler(limits(max_num_batched_tokens=130))
    scheduler.add(request("a", 10, 9))
    step(scheduler)
    scheduler.add(request("b", 300, 9))
    assert spans(step(scheduler)) == [("a", 10, 11, True), ("b", 0, 128, False)]
    assert spans(step(scheduler)) == [("a", 11, 12, True), ("b", 128, 256, False)]
    assert spans(step(scheduler)) == [("a", 12, 13, True), ("b", 256, 300, True)]
    assert spans(step(scheduler)) == [("a", 13, 14, True), ("b", 300, 301, True)]


def test_several_prompts_share_a_step() -> None:
    scheduler = Scheduler(limits(max_num_batched_tokens=200))
    for name, length in (("a", 50), ("b", 60), ("c", 100)):
        scheduler.add(request(name, length, 2))
    assert spans(step(scheduler)) == [("a", 0, 50, True), ("b", 0, 60, True), ("c", 0, 64, False)]
    assert spans(step(scheduler)) == [("a", 50, 51, True), ("b", 60, 61, True), ("c", 64, 100, True)]


def test_the_step_hands_down_the_tokens_of_prompt_and_output() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3, 3))
    assert step(scheduler, token_id=11).sequences[0].token_ids == (0, 1, 2)
    assert step(scheduler, token_id=12).sequences[0].token_ids == (11,)
    assert step(scheduler).sequences[0].token_ids == (12,)


def test_waiting_for_blocks_and_for_slots() -> None:
    scheduler = Scheduler(limits(num_blocks=4))
    first, second = request("a", 33, 2), request("b", 30, 3)  # 34 and 32 tokens: 3 and 2 blocks
    scheduler.add(first)
    scheduler.add(second)
    assert spans(step(scheduler)) == [("a", 0, 33, True)]
    assert len(first.blocks) == 3 and scheduler.num_waiting == 1
    step(scheduler)
    assert first.finish_reason == "length" and not first.blocks
    assert spans(step(scheduler)) == [("b", 0, 30, True)]

    scheduler = Scheduler(limits(num_slots=1))
    scheduler.add(request("a", 5, 1))
    scheduler.add(request("b", 5, 1))
    assert spans(step(scheduler)) == [("a", 0, 5, True)]
    plan = step(scheduler)
    assert spans(plan) == [("b", 0, 5, True)] and plan.freed_slots == (0,)


def test_a_request_too_large_for_the_whole_pool_is_refused() -> None:
    scheduler = Scheduler(limits(num_blocks=4))
    scheduler.add(request("fits", 60, 5))
    with pytest.raises(DoesNotFit, match="65 tokens of KV cache; 64 would fit"):
        scheduler.add(request("large", 60, 6))
    assert scheduler.num_waiting == 1


def test_a_model_without_full_attention_needs_no_blocks() -> None:
    scheduler = Scheduler(limits(num_blocks=None))
    endless = request("a", 10_000, 10_000)
    scheduler.add(endless)
    step(scheduler)
    assert endless.blocks == [] and endless.slot is not None


def test_a_stop_token_ends_a_request() -> None:
    scheduler = Scheduler(limits())
    stopping = request("a", 5, 10, stop=9)
    scheduler.add(stopping)
    step(scheduler, token_id=8)
    plan = scheduler.plan()
    assert plan is not None
    (event,) = scheduler.commit(answer(plan, token_id=9))
    assert event.finish_reason == stopping.finish_reason == "stop"
    assert stopping.output_ids == [8, 9]
    assert not scheduler.has_unfinished


def test_abort_between_plan_and_commit() -> None:
    scheduler = Scheduler(limits())
    gone, stays = request("gone", 5, 10), request("stays", 5, 10)
    scheduler.add(gone)
    scheduler.add(stays)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort(gone)
    assert gone.blocks, "the step in flight still writes there"
    events = scheduler.commit(answer(plan))
    assert [event.request_id for event in events] == ["stays"]
    assert not gone.output_ids and not gone.blocks
    scheduler.check_integrity()
    next_plan = scheduler.plan()
    assert next_plan is not None and len(next_plan.freed_blocks) == 1 and len(next_plan.freed_slots) == 1


def test_discarded_steps_free_everything() -> None:
    scheduler = Scheduler(limits())
    for name in "ab":
        scheduler.add(request(name, 5, 10))
    assert scheduler.plan() is not None
    assert [r.finish_reason for r in scheduler.discard_step()] == ["abort", "abort"]
    scheduler.check_integrity()
    assert not scheduler.has_unfinished and scheduler.blocks.num_used == 0


def test_short_and_long_prompts_share_a_step_fairly() -> None:
    """A short prompt that comes beside a long one does not wait until that is read."""
    scheduler = Scheduler(limits(max_num_batched_tokens=256, num_blocks=100))
    requests = [request("long", 900, 2), request("short", 100, 9, first=1000), request("other", 90, 9, first=2000)]
    scheduler.add(requests[0])
    step(scheduler)
    scheduler.add(requests[1])
    scheduler.add(requests[2])
    assert {s[0] for s in spans(step(scheduler))} == {"long", "short"}
    assert {s[0] for s in spans(step(scheduler))} == {"long", "short", "other"}
    assert [len(r.output_ids) for r in requests] == [0, 2, 1]


def test_the_youngest_makes_room_and_comes_back() -> None:
    scheduler = Scheduler(limits(num_blocks=7, has_prefix_cache=True, num_slots=8, min_prefix_tokens=1))
    old, young = request("old", 40, 40), request("young", 40, 40, first=500)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.has_unfinished:
        step(scheduler)
    assert scheduler.num_preemptions > 0
    assert old.output_ids == young.output_ids == [7] * 40
    assert young.num_cached_tokens == 0, "what it finds when it comes back is its own"


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
        assert blocked.num_computed_tokens == 0
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


def test_a_failed_step_forgets_only_what_it_was_to_copy() -> None:
    scheduler = Scheduler(limits(has_prefix_cache=True, num_slots=20, num_blocks=60, checkpoint_interval=128))
    assert scheduler.prefixes is not None
    old, new = request("old", 200, 2), request("new", 300, 2, first=1000)
    scheduler.add(old)
    while old.finish_reason is None:
        step(scheduler)
    step_of_copies = scheduler.plan()
    assert step_of_copies is None or not step_of_copies.sequences
    if step_of_copies is not None:
        scheduler.commit(StepResult({}))
    scheduler.add(new)
    step(scheduler)  # up to 128, where its state is to be copied by the next step
    known = scheduler.prefixes.lookup(tuple(range(200)), salt="", limit=199)
    assert known.num_tokens >= 128
    prompt = new.prompt_ids
    assert scheduler.prefixes.lookup(prompt, salt="", limit=299).num_tokens == 128
    plan = scheduler.plan()
    assert plan is not None and plan.slot_copies
    assert scheduler.discard_step() == [new]
    scheduler.check_integrity()
    assert scheduler.prefixes.lookup(prompt, salt="", limit=299).num_tokens == 0
    assert scheduler.prefixes.lookup(tuple(range(200)), salt="", limit=199) == known
    again = request("again", 300, 2, first=1000)
    scheduler.add(again)
    following = scheduler.plan()
    assert following is not None
    assert set(plan.freed_blocks) | set(plan.freed_slots) <= set(following.freed_blocks) | set(following.freed_slots)
    assert {target for _, target in plan.slot_copies} <= set(following.freed_slots)


def test_a_step_costs_the_same_in_the_middle_of_a_long_prompt() -> None:
    """In 16 tokens of a prompt of 262,144, a copy of what is computed or a walk over it would take a hundred times as
    long as all that is needed."""
    for has_states in (True, False):
        scheduler = Scheduler(
            limits(
                num_blocks=17_000, num_slots=30, has_prefix_cache=True, has_states=has_states,
                checkpoint_interval=4096, chunk_size=1, max_num_batched_tokens=2064, max_num_seqs=17,
            )
        )  # fmt: skip
        for n in range(16):
            scheduler.add(request(str(n), 20, 400, first=1000 * n))
        step_unchecked(scheduler)
        long = request("long", 262_144, 2, first=100_000)
        scheduler.add(long)
        spent = []
        while len(long.output_ids) == 0:
            start = time.process_time()
            step_unchecked(scheduler)
            spent.append(time.process_time() - start)
        assert 126 < len(spent) < 200
        assert sorted(spent)[len(spent) // 2] < 0.004, "128 blocks are noted, and 16 requests go on"
        scheduler.check_integrity()


def step_unchecked(scheduler: Scheduler) -> None:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(answer(plan))


def test_a_step_that_is_taken_back_runs_again_and_apart() -> None:
    scheduler = Scheduler(limits(has_prefix_cache=True, num_slots=8))
    first, second, third = (request(name, 100 + n, 4, first=1000 * n) for n, name in enumerate("abc"))
    for one in (first, second):
        scheduler.add(one)
    plan = scheduler.plan()
    assert plan is not None and [s.request for s in plan.sequences] == [first, second]
    assert scheduler.discard_step(requeues=True) == [first, second]
    scheduler.check_integrity()
    assert (first.finish_reason, first.num_computed_tokens, first.blocks) == (None, 0, [])
    first.apart_until = second.apart_until = 50
    scheduler.add(third)
    seen: list[tuple[str, ...]] = []
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        assert plan is not None
        apart = [s.request for s in plan.sequences if s.request.runs_apart]
        assert not apart or len(plan.sequences) == 1
        seen.append(tuple(s.request.id for s in plan.sequences))
        scheduler.commit(answer(plan))
        scheduler.check_integrity()
    assert {("a",), ("b",), ("a", "b", "c")} <= set(seen)
    assert {one.finish_reason for one in (first, second, third)} == {"length"}


def test_drafts_are_planned_where_they_fit_and_booked_as_accepted() -> None:
    scheduler = Scheduler(limits())
    one = request("a", 5, 6)
    scheduler.add(one)
    step(scheduler)
    one.drafts = (8, 9, 10)
    plan = scheduler.plan()
    assert plan is not None and plan.sequences[0].token_ids == (7, 8, 9, 10)
    scheduler.commit(StepResult({"a": (SampledToken(8), SampledToken(9), SampledToken(1))}))
    assert one.output_ids == [7, 8, 9, 1] and one.num_computed_tokens == 8 and one.drafts == ()
    one.drafts = (2, 3, 4, 5)
    plan = scheduler.plan()
    assert plan is not None and plan.sequences[0].token_ids == (1, 2), "the answer ends two tokens from here"
    scheduler.commit(StepResult({"a": (SampledToken(2), SampledToken(3))}))
    assert one.finish_reason == "length" and one.output_ids == [7, 8, 9, 1, 2, 3]
    scheduler.check_integrity()


def test_tokens_after_a_stop_token_are_dropped() -> None:
    scheduler = Scheduler(limits(has_prefix_cache=True, num_slots=8, min_prefix_tokens=1))
    one = request("a", 5, 9, stop=3)
    scheduler.add(one)
    step(scheduler)
    one.drafts = (3, 4)
    assert scheduler.plan() is not None
    events = scheduler.commit(StepResult({"a": (SampledToken(3), SampledToken(4), SampledToken(5))}))
    assert [e.token.token_id for e in events] == [3] and events[0].finish_reason == "stop"
    assert one.num_computed_tokens == 6, "the stop token was drafted, not read: its state is not the request's"
    scheduler.check_integrity()


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
                scheduler.resume(recent.popleft())
            unfinished.append(one)
            num_added += 1
        if recent and rng.random() < 0.15:
            scheduler.abort(rng.choice(list(recent)[-12:]))
            scheduler.check_integrity()
        for r in recent:
            if rng.random() < 0.02:
                scheduler.park(r)
            if rng.random() < 0.1 or not scheduler.has_unfinished:
                scheduler.resume(r)
            if r.output_ids and r.finish_reason is None:
                r.drafts = tuple(rng.randint(0, 40) for _ in range(rng.randint(0, 4)))
        plan = scheduler.plan()
        if plan is None:
            assert not scheduler.has_unfinished
            continue
        check_plan(plan, bounds)
        if rng.random() < 0.05 and plan.sequences:
            scheduler.abort(rng.choice(plan.sequences).request)
        if rng.random() < 0.02:
            requeues = rng.random() < 0.7
            failed = scheduler.discard_step(requeues=requeues)
            for r in failed if requeues and rng.random() < 0.8 else ():
                r.apart_until = rng.randint(1, r.num_tokens + 5)
        else:
            scheduler.commit(StepResult({s.request.id: window(rng, s) for s in plan.sequences if s.needs_sample}))
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


def check_plan(plan: StepPlan, bounds: Limits) -> None:
    """Within the budget, every request once, in blocks of its own, from where it is."""
    assert sum(len(s.token_ids) for s in plan.sequences) <= bounds.max_num_batched_tokens
    assert plan.sequences or plan.slot_copies
    assert len({s.request.id for s in plan.sequences}) == len(plan.sequences)
    slots = [s.request.slot for s in plan.sequences]
    assert len(set(slots)) == len(slots)
    written: list[int] = []
    for s in plan.sequences:
        end = s.start + len(s.token_ids)
        assert s.start == s.request.num_computed_tokens and end > s.start
        assert s.needs_sample or end % bounds.chunk_size == 0
        assert s.token_ids == s.request.token_range(s.start, end - len(s.drafts)) + s.drafts
        if bounds.num_blocks is not None:
            assert end <= len(s.request.blocks) * bounds.block_size
            written += s.request.blocks[s.start // bounds.block_size : -(-end // bounds.block_size)]
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


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(UsageError, match="max_num_seqs"):
        limits(max_num_seqs=0)
    with pytest.raises(UsageError, match="67"):
        limits(max_num_batched_tokens=66)
