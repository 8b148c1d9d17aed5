"""Policy over integers: what runs when, and that nothing is ever lost."""

from __future__ import annotations

import random
import sys

import pytest

from qnext.engine.blocks import IdPool
from qnext.engine.request import Request, SampledToken, SamplingParams
from qnext.engine.scheduler import Scheduler
from qnext.engine.step import Limits, StepPlan, StepResult
from qnext.errors import DoesNotFit, UsageError

CHUNK = 64


def limits(**changes: int | None) -> Limits:
    values: dict[str, int | None] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 200, "block_size": 16, "num_blocks": 40, "num_slots": 4,
        "chunk_size": CHUNK,
    }  # fmt: skip
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def request(name: str, num_prompt: int, max_tokens: int, *, stop: int = -1) -> Request:
    prompt = tuple(range(num_prompt))
    return Request(name, prompt, SamplingParams(), seed=0, max_tokens=max_tokens, stop_ids=frozenset({stop}))


def answer(plan: StepPlan, token_id: int = 7) -> StepResult:
    return StepResult({s.request.id: SampledToken(token_id) for s in plan.sequences if s.needs_sample})


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


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(seed: int) -> None:
    """Hundreds of requests each, arriving, finishing and aborted at random; checked after every step."""
    rng = random.Random(seed)
    max_num_seqs = rng.randint(1, 9)
    bounds = limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs - 1 + CHUNK + rng.randint(0, 300),
        num_blocks=rng.randint(20, 60),
        num_slots=rng.randint(1, max_num_seqs),
    )
    scheduler = Scheduler(bounds)
    requests: list[Request] = []
    num_read: dict[str, int] = {}
    while len(requests) < 600 or scheduler.has_unfinished:
        for _ in range(rng.randint(0, 3) if len(requests) < 600 else 0):
            length = rng.randint(1, 20 * 16 - 30)
            requests.append(request(str(len(requests)), length, rng.randint(1, 30), stop=5))
            scheduler.add(requests[-1])
        if requests and rng.random() < 0.15:
            scheduler.abort(rng.choice(requests[-12:]))
            scheduler.check_integrity()
        plan = scheduler.plan()
        if plan is None:
            assert not scheduler.has_unfinished
            continue
        assert 0 < sum(len(s.token_ids) for s in plan.sequences) <= bounds.max_num_batched_tokens
        assert len({s.request.id for s in plan.sequences}) == len(plan.sequences)
        for s in plan.sequences:
            end = s.start + len(s.token_ids)
            assert s.start == num_read.get(s.request.id, 0)
            assert s.needs_sample or end % CHUNK == 0
            assert end <= len(s.request.blocks) * bounds.block_size
            num_read[s.request.id] = end
        decoding = [r for r in requests if r.blocks and 0 < r.num_computed_tokens == r.num_tokens - 1]
        assert {r.id for r in decoding} <= {s.request.id for s in plan.sequences}
        if rng.random() < 0.05:
            scheduler.abort(rng.choice(plan.sequences).request)
        if rng.random() < 0.02:
            scheduler.discard_step()
        else:
            tokens = {s.request.id: SampledToken(rng.randint(0, 40)) for s in plan.sequences if s.needs_sample}
            scheduler.commit(StepResult(tokens))
        scheduler.check_integrity()
    assert scheduler.blocks.num_used == scheduler.slots.num_used == 0
    reasons = [r.finish_reason for r in requests]
    assert set(reasons) == {"stop", "length", "abort"}
    for r in requests:
        assert r.finish_reason != "length" or len(r.output_ids) == r.max_tokens
        assert r.finish_reason != "stop" or (r.output_ids[-1] == 5 and 5 not in r.output_ids[:-1])


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


def test_policy_needs_no_torch() -> None:
    """Names of torch in the modules of policy would mean that they see tensors."""
    for name in ("request", "blocks", "scheduler"):
        module = sys.modules[f"qnext.engine.{name}"]
        assert not any(getattr(value, "__module__", "").startswith("torch") for value in vars(module).values())
        assert "torch" not in vars(module)
