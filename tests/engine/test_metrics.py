"""What the engine counts is what it did, in schedules whose numbers are known."""

from __future__ import annotations

import json
import threading
from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest

from qnext.engine import Engine, EngineConfig, FinishCounts, FinishReason, SamplingParams
from qnext.engine.metrics import REQUEST_SECONDS, STEP_TOKENS, TOKEN_SECONDS
from qnext.engine.policy.step import StepPlan
from qnext.errors import QnextError
from qnext.ops import backends
from tests.engine.counting import COUNTERS, GREEDY, check, check_grown, check_load, make_engine
from tests.engine.drafts import GivenDrafts
from tests.engine.models import NATIVE, random_prompt, tiny_model
from tests.model.models import make_in_form


def test_counts_and_times_of_a_known_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, max_model_len=64))
    first = engine.add_request(random_prompt(5, seed=1), GREEDY)
    second = engine.add_request(random_prompt(9, seed=2), SamplingParams(max_tokens=2, ignore_eos=True))
    assert (engine.metrics.gauges.num_waiting, engine.metrics.gauges.num_running) == (2, 0)
    for seconds in (2.0, 0.25, 0.25, 0.5, 4.0, 0.125):
        now += seconds
        engine.step()
        check(engine.metrics)
    assert not engine.has_unfinished
    times = first.times
    assert (times.arrived, times.scheduled, times.finished) == (100.0, 102.0, 103.0)
    assert (times.first_token, times.last_token) == (102.0, 103.0)
    assert (second.times.scheduled, second.times.last_token, second.times.finished) == (107.0, 107.125, 107.125)
    metrics = engine.metrics
    assert [getattr(metrics, name) for name in COUNTERS] == [2, 6, 14, 0, 6, 0, 0, 0]
    assert metrics.finished == FinishCounts(length=2)
    assert metrics.step_tokens.sum == 5 + 3 + 9 + 1
    assert [n for n in metrics.step_tokens.counts if n] == [4, 1, 1]
    assert metrics.step_tokens.counts[3:5] == (1, 1)  # at most 8 tokens, and at most 16
    assert (metrics.queue_time.sum, metrics.queue_time.count) == (2.0 + 7.0, 2)
    assert (metrics.time_to_first_token.sum, metrics.time_to_first_token.count) == (2.0 + 7.0, 2)
    assert (metrics.inter_token_latency.sum, metrics.inter_token_latency.count) == (1.125, 4)
    assert (metrics.end_to_end_time.sum, metrics.end_to_end_time.count) == (3.0 + 7.125, 2)
    latency = dict(zip(metrics.inter_token_latency.bounds, metrics.inter_token_latency.counts, strict=False))
    assert {bound: count for bound, count in latency.items() if count} == {0.15: 1, 0.3: 2, 0.5: 1}
    assert metrics.gauges.num_running == metrics.gauges.num_waiting == metrics.gauges.num_slots_running == 0


def test_bounds_rise_and_are_round() -> None:
    for bounds in (REQUEST_SECONDS, TOKEN_SECONDS, STEP_TOKENS):
        assert list(bounds) == sorted(set(bounds)) and max(len(str(bound)) for bound in bounds) <= 6
    assert (REQUEST_SECONDS[0], REQUEST_SECONDS[-1], TOKEN_SECONDS[0], TOKEN_SECONDS[-1]) == (0.001, 1000, 0.001, 10)


def test_every_finish_reason_has_its_counter() -> None:
    assert {field.name for field in fields(FinishCounts)} == set(get_args(FinishReason))


class Refusing:
    """Allows three tokens."""

    def __init__(self) -> None:
        self.left = 3

    def allowed(self) -> None:
        if not self.left:
            raise QnextError("no way on")

    def accept(self, token_id: int) -> None:
        self.left -= 1

    def copy(self) -> Refusing:
        return Refusing()


def test_requests_are_counted_by_the_way_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=3, max_model_len=64))
    long = SamplingParams(max_tokens=20, ignore_eos=True)
    stop_id = engine.generate([[1, 2, 3]], GREEDY)[0].output_ids[1]
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(stop_id,)))
    engine.add_request([4, 5], SamplingParams(max_tokens=20), guide=Refusing())
    late, waiting = (engine.add_request([n, 7], long, timeout=5) for n in (5, 6))
    running = engine.add_request([8], long)
    for _ in range(4):
        engine.step()
        check(engine.metrics)
    assert engine.metrics.finished == FinishCounts(length=1, stop=1, error=1)
    now = 56.0
    engine.step()
    assert engine.metrics.finished == FinishCounts(length=1, stop=1, error=1, deadline=2)
    assert late.times.finished == waiting.times.finished == 56.0
    engine.abort(running.id)
    engine.abort(running.id)
    assert running.times.finished == 56.0
    check(engine.metrics)
    assert engine.metrics.finished == FinishCounts(length=1, stop=1, error=1, deadline=2, abort=1)
    assert engine.metrics.end_to_end_time.count == 2
    assert not engine.has_unfinished


def test_a_failed_step_counts_its_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, executor = make_engine(tiny_model("hybrid"), max_num_seqs=1, max_model_len=64)
    request, other = engine.add_request([1, 2], GREEDY), engine.add_request([3, 4, 5], GREEDY)
    engine.step()
    before = engine.metrics
    run = executor.execute

    def fail(plan: StepPlan) -> None:
        run(plan)  # the model computes, routers count
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(executor, "execute", fail)
        engine.step()
    assert request.finish_reason == "error" and request.times.finished is not None
    failed = engine.metrics
    check(failed)
    assert failed.finished == FinishCounts(error=1)
    assert (failed.num_steps, failed.step_tokens, failed.output_tokens) == (1, before.step_tokens, 1)
    while engine.has_unfinished:
        engine.step()
    assert other.finish_reason == "length"
    load = engine.expert_load()
    assert load is not None
    assert {sum(layer.tokens) for layer in load.layers} == {2 * int(engine.metrics.step_tokens.sum)}


def test_preempted_work_is_counted_again() -> None:
    """Two answers grow until the blocks are gone; without a cache the younger one is computed anew."""
    model = tiny_model("hybrid")
    prompts = [list(range(1, 41)), list(range(2, 42))]
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    engine, executor = make_engine(model, max_num_seqs=2, max_model_len=256, num_blocks=12, prefix_cache=False)
    engine.generate(prompts, params)
    metrics = engine.metrics
    check(metrics)
    assert metrics.num_preemptions == engine.scheduler.num_preemptions > 0
    assert metrics.step_tokens.sum == executor.num_tokens > 2 * (40 + 99)
    assert metrics.prompt_tokens_computed == 40 * (2 + metrics.num_preemptions)
    assert metrics.output_tokens == 200
    assert metrics.queue_time.count == metrics.time_to_first_token.count == 2
    check_load(engine, executor.num_tokens)


def test_cached_prefixes() -> None:
    system = random_prompt(128, seed=0)
    engine, executor = make_engine(tiny_model("hybrid"), max_num_seqs=4, max_model_len=256, num_checkpoints=8)
    engine.generate([[*system, n, *range(30)] for n in range(16)], SamplingParams(max_tokens=3, ignore_eos=True))
    metrics = engine.metrics
    check(metrics)
    assert metrics.prompt_tokens_cached == 15 * 128
    assert metrics.prompt_tokens_computed == 16 * 159 - 15 * 128
    assert (metrics.prefix.num_requests, metrics.prefix.num_hits, metrics.prefix.tokens_hit) == (16, 15, 15 * 128)
    assert metrics.prefix.num_checkpoints_evicted > 0
    assert metrics.gauges.num_slots_cached == metrics.gauges.num_slots_used > 0
    assert metrics.gauges.num_blocks_cached == metrics.gauges.num_blocks_used >= 128 // 16
    assert metrics.step_tokens.sum == executor.num_tokens == metrics.prompt_tokens_computed + 16 * 2
    check_load(engine, executor.num_tokens)


def test_several_completions_are_several_requests() -> None:
    engine, executor = make_engine(tiny_model("hybrid"), max_num_seqs=4, max_model_len=256)
    engine.generate([random_prompt(70, seed=3)], SamplingParams(n=3, max_tokens=5, ignore_eos=True, temperature=1.0))
    metrics = engine.metrics
    check(metrics)
    assert (metrics.num_requests, metrics.finished, metrics.output_tokens) == (3, FinishCounts(length=3), 15)
    assert metrics.prompt_tokens_computed + metrics.prompt_tokens_cached == 3 * 70
    # The reference goes on from multiples of 64 only.
    assert metrics.prompt_tokens_cached == 2 * (69 if backends.cpu_kernels() is not None else 64)
    check_load(engine, executor.num_tokens)


@pytest.mark.parametrize("name", ["tiny", NATIVE])
def test_drafts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    model = tiny_model("hybrid") if name == "tiny" else make_in_form(name, "float32")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (plain,) = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64)).generate([[1, 2, 3]], params)
    wanted = plain.output_ids
    wrong = (wanted[6] + 1) % model.config.vocab_size
    engine, executor = make_engine(model, max_num_seqs=2, max_model_len=64, max_draft_tokens=3)
    engine.drafter = given = GivenDrafts()
    other = engine.add_request([4, 5], params)
    request = engine.add_request([1, 2, 3], params)
    engine.step()
    proposals = [wanted[1:4], (wanted[5], wrong, wanted[7]), (), (*wanted[8:11], 0)]
    counts = [(3, 3, 5), (6, 4, 7), (6, 4, 8), (9, 7, 12)]
    for drafts, expected in zip(proposals, counts, strict=True):
        now += 1.0
        given[request.id] = drafts
        engine.step()
        assert (request.num_drafted, request.num_accepted, len(request.output_ids)) == expected
        check(engine.metrics)
    assert tuple(request.output_ids) == wanted and request.finish_reason == "length"
    metrics = engine.metrics
    assert (metrics.drafted_tokens, metrics.accepted_tokens) == (9, 7)
    assert (other.num_drafted, other.num_accepted) == (0, 0)
    # A step of several tokens: the first of them took the time, the others none.
    assert metrics.inter_token_latency.count == 11 + 4 and metrics.inter_token_latency.counts[0] == 11 - 4
    assert metrics.inter_token_latency.sum == 4.0 + 4.0
    assert metrics.step_tokens.sum == executor.num_tokens == 5 + (4 + 1) + (4 + 1) + (1 + 1) + (4 + 1)
    check_load(engine, executor.num_tokens)


def test_a_draft_that_ends_the_answer_is_accepted() -> None:
    model = tiny_model("hybrid")
    wanted = (
        Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64)).generate([[1, 2, 3]], GREEDY)[0].output_ids
    )
    assert wanted[2] not in wanted[:2]
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64, max_draft_tokens=3))
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(wanted[2],))
    request = engine.add_request([1, 2, 3], params)
    engine.step()
    engine.drafter = GivenDrafts({request.id: wanted[1:4]})
    engine.step()
    assert request.finish_reason == "stop" and (request.num_drafted, request.num_accepted) == (3, 2)


def test_drafts_of_an_answer_that_fails_are_not_accepted() -> None:
    """The guide refuses after two right drafts; the request ends and gets none of them."""
    model = tiny_model("hybrid")
    params = SamplingParams(max_tokens=20)
    wanted = (
        Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64)).generate([[1, 2, 3]], params)[0].output_ids
    )
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64, max_draft_tokens=3))
    request = engine.add_request([1, 2, 3], params, guide=Refusing())
    engine.step()
    engine.drafter = GivenDrafts({request.id: wanted[1:4]})
    engine.step()
    assert request.finish_reason == "error" and request.output_ids == [wanted[0]]
    assert (engine.metrics.drafted_tokens, engine.metrics.accepted_tokens) == (3, 0)
    check(engine.metrics)


def test_a_snapshot_never_changes_and_is_plain() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2, max_model_len=128))
    engine.generate([random_prompt(70, seed=1)], GREEDY)
    metrics, load = engine.metrics, engine.expert_load()
    assert load is not None
    texts = json.dumps(metrics.as_dict()), json.dumps(load.as_dict())
    engine.generate([random_prompt(70, seed=1), random_prompt(20, seed=2)], GREEDY)
    assert engine.metrics != metrics and engine.expert_load() != load
    assert (json.dumps(metrics.as_dict()), json.dumps(load.as_dict())) == texts
    assert json.loads(texts[0])["gauges"]["num_slots"] == engine.scheduler.slots.size
    with pytest.raises(FrozenInstanceError):
        metrics.num_steps = 0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        load.layers[0].num_dead = 0  # type: ignore[misc]


def test_another_thread_sees_whole_steps() -> None:
    engine = Engine.of(make_in_form(NATIVE, "float32"), EngineConfig(max_num_seqs=3, max_model_len=128))
    is_over = threading.Event()
    failures: list[BaseException] = []
    num_seen: list[int] = []

    def watch() -> None:
        metrics = engine.metrics
        try:
            while not is_over.is_set():
                before, metrics = metrics, engine.metrics
                check(metrics)
                check_grown(before, metrics)
                load = engine.expert_load(2)
                assert load is not None
                assert len({sum(layer.tokens) for layer in load.layers}) == 1
                assert len({sum(layer.recent) for layer in load.layers}) == 1
                num_seen.append(metrics.num_steps)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.generate([random_prompt(length, seed=length) for length in (5, 40, 17, 30, 9, 22)], params)
    is_over.set()
    thread.join()
    assert not failures
    assert len(set(num_seen)) > 5
