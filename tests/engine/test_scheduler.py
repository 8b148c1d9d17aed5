"""Policy over integers: what runs when, and that nothing is ever lost."""

from __future__ import annotations

import pytest

from qnext.engine.policy.request import SampledToken
from qnext.engine.policy.scheduler import Scheduler
from qnext.engine.policy.step import StepResult
from qnext.errors import DoesNotFit, UsageError
from tests.engine.schedules import answer, limits, request, spans, step


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
    held = scheduler.add(first)
    scheduler.add(second)
    assert spans(step(scheduler)) == [("a", 0, 33, True)]
    assert len(held.blocks) == 3 and scheduler.num_waiting == 1
    step(scheduler)
    assert first.finish_reason == "length" and not held.blocks
    assert spans(step(scheduler)) == [("b", 0, 30, True)]

    scheduler = Scheduler(limits(num_slots=1))
    scheduler.add(request("a", 5, 1))
    scheduler.add(request("b", 5, 1))
    assert spans(step(scheduler)) == [("a", 0, 5, True)]
    plan = step(scheduler)
    assert spans(plan) == [("b", 0, 5, True)] and plan.freed_slots == (0,)


def test_blocks_are_kept_free_for_requests_that_may_still_grow_and_for_no_others() -> None:
    scheduler = Scheduler(limits(num_blocks=2))
    scheduler.add(request("a", 5, 3))
    scheduler.add(request("b", 6, 3))
    assert spans(step(scheduler)) == [("a", 0, 5, True), ("b", 0, 6, True)], "one block each is all that they need"

    scheduler = Scheduler(limits(num_blocks=2))
    scheduler.add(request("a", 5, 13))  # 17 tokens
    scheduler.add(request("b", 6, 3))
    for _ in range(12):
        assert len(step(scheduler).sequences) == 1, "the second block is for the first request"
    step(scheduler)
    assert spans(step(scheduler)) == [("b", 0, 6, True)] and scheduler.num_preemptions == 0


def test_a_request_too_large_for_the_whole_pool_is_refused() -> None:
    scheduler = Scheduler(limits(num_blocks=4))
    scheduler.add(request("fits", 60, 5))
    with pytest.raises(DoesNotFit, match="65 tokens of KV cache; 64 would fit"):
        scheduler.add(request("large", 60, 6))
    assert scheduler.num_waiting == 1


def test_a_model_without_full_attention_needs_no_blocks() -> None:
    scheduler = Scheduler(limits(num_blocks=None))
    endless = scheduler.add(request("a", 10_000, 10_000))
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
    held = scheduler.add(gone)
    scheduler.add(stays)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort("gone")
    assert held.blocks, "the step in flight still writes there"
    events = scheduler.commit(answer(plan))
    assert [event.request_id for event in events] == ["stays"]
    assert not gone.output_ids and not held.blocks
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


def test_a_step_that_is_taken_back_runs_again_and_apart() -> None:
    scheduler = Scheduler(limits(has_prefix_cache=True, num_slots=8))
    first, second, third = (request(name, 100 + n, 4, first=1000 * n) for n, name in enumerate("abc"))
    held, _ = scheduler.add(first), scheduler.add(second)
    plan = scheduler.plan()
    assert plan is not None and [s.request_id for s in plan.sequences] == ["a", "b"]
    assert scheduler.discard_step(requeues=True) == [first, second]
    scheduler.check_integrity()
    assert (first.finish_reason, held.num_computed_tokens, held.blocks) == (None, 0, [])
    for name in "ab":
        scheduler.recovery.set_apart(name, until=50)
    scheduler.add(third)
    seen: list[tuple[str, ...]] = []
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        assert plan is not None
        apart = [s for s in plan.sequences if s.request_id in "ab" and s.start < 50]
        assert not apart or len(plan.sequences) == 1
        seen.append(tuple(s.request_id for s in plan.sequences))
        scheduler.commit(answer(plan))
        scheduler.check_integrity()
    assert {("a",), ("b",), ("a", "b", "c")} <= set(seen)
    assert {one.finish_reason for one in (first, second, third)} == {"length"}


def test_drafts_are_planned_where_they_fit_and_booked_as_accepted() -> None:
    scheduler = Scheduler(limits())
    one = request("a", 5, 6)
    held = scheduler.add(one)
    step(scheduler)
    plan = scheduler.plan({"a": (8, 9, 10)})
    assert plan is not None and plan.sequences[0].token_ids == (7, 8, 9, 10)
    scheduler.commit(StepResult({"a": (SampledToken(8), SampledToken(9), SampledToken(1))}))
    assert one.output_ids == [7, 8, 9, 1] and held.num_computed_tokens == 8
    plan = scheduler.plan({"a": (2, 3, 4, 5)})
    assert plan is not None and plan.sequences[0].token_ids == (1, 2), "the answer ends two tokens from here"
    scheduler.commit(StepResult({"a": (SampledToken(2), SampledToken(3))}))
    assert one.finish_reason == "length" and one.output_ids == [7, 8, 9, 1, 2, 3]
    scheduler.check_integrity()


def test_tokens_after_a_stop_token_are_dropped() -> None:
    scheduler = Scheduler(limits(has_prefix_cache=True, num_slots=8, min_prefix_tokens=1))
    one = request("a", 5, 9, stop=3)
    held = scheduler.add(one)
    step(scheduler)
    assert scheduler.plan({"a": (3, 4)}) is not None
    events = scheduler.commit(StepResult({"a": (SampledToken(3), SampledToken(4), SampledToken(5))}))
    assert [e.token.token_id for e in events] == [3] and events[0].finish_reason == "stop"
    assert held.num_computed_tokens == 6, "the stop token was drafted, not read: its state is not the request's"
    scheduler.check_integrity()


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(UsageError, match="max_num_seqs"):
        limits(max_num_seqs=0)
    with pytest.raises(UsageError, match="67"):
        limits(max_num_batched_tokens=66)
