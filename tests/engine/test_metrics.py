"""What the engine counts is what it did, in schedules whose numbers are known."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, EngineMetrics, FinishCounts, FinishReason, Request, SamplingParams
from qnext.engine.metrics import REQUEST_SECONDS, STEP_TOKENS, TOKEN_SECONDS
from qnext.engine.runner import Runner
from qnext.engine.step import StepPlan
from qnext.errors import QnextError
from qnext.model import Batch, CausalLM, Router
from qnext.ops import backend
from tests.engine.models import random_prompt, tiny_model
from tests.model.models import OneRequest, logits_of, make_in_form, make_model, next_config, random_tokens

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
NATIVE = "next, sizes of the native kernels"
DENSE_LAYERS = "next, any pattern, dense layers"
COUNTERS = (
    "num_requests", "num_steps", "prompt_tokens_computed", "prompt_tokens_cached", "output_tokens", "drafted_tokens",
    "accepted_tokens", "num_preemptions",
)  # fmt: skip
HISTOGRAMS = ("step_tokens", "queue_time", "time_to_first_token", "inter_token_latency", "end_to_end_time")


class CountingRunner(Runner):
    """Counts the tokens of the plans, and keeps the logits of every chosen token."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model, engine.cache)
        self.num_tokens = 0
        self.rows: list[Tensor] = []

    def run(self, plan: StepPlan):  # type: ignore[no-untyped-def]
        self.num_tokens += sum(len(sequence.token_ids) for sequence in plan.sequences)
        output = super().run(plan)
        self.rows.append(output.logits_RY.clone())
        return output


def make_engine(model: CausalLM, **options: Any) -> tuple[Engine, CountingRunner]:
    engine = Engine(model, poison=True, **options)
    engine.runner = runner = CountingRunner(engine)
    return engine, runner


def check(metrics: EngineMetrics) -> None:
    """What holds at every moment."""
    gauges = metrics.gauges
    assert metrics.num_requests == sum(asdict(metrics.finished).values()) + gauges.num_running + gauges.num_waiting
    assert metrics.step_tokens.count == metrics.num_steps
    assert metrics.time_to_first_token.count + metrics.inter_token_latency.count == metrics.output_tokens
    assert metrics.accepted_tokens <= metrics.drafted_tokens
    assert gauges.num_slots_running + gauges.num_slots_cached <= gauges.num_slots_used <= gauges.num_slots
    assert gauges.num_blocks_cached <= gauges.num_blocks_used <= gauges.num_blocks


def check_grown(before: EngineMetrics, after: EngineMetrics) -> None:
    old, new = before.as_dict(), after.as_dict()
    for name in COUNTERS:
        assert old[name] <= new[name]
    for name in HISTOGRAMS:
        assert old[name]["sum"] <= new[name]["sum"]
        assert all(a <= b for a, b in zip(old[name]["counts"], new[name]["counts"], strict=True))
    for part in ("finished", "prefix"):
        assert all(count <= new[part][name] for name, count in old[part].items())


def test_counts_and_times_of_a_known_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine = Engine(tiny_model("hybrid"), max_num_seqs=1, max_model_len=64)
    first = engine.add_request(random_prompt(5, seed=1), GREEDY)
    second = engine.add_request(random_prompt(9, seed=2), SamplingParams(max_tokens=2, ignore_eos=True))
    assert (engine.metrics.gauges.num_waiting, engine.metrics.gauges.num_running) == (2, 0)
    for seconds in (2.0, 0.25, 0.25, 0.5, 4.0, 0.125):
        now += seconds
        engine.step()
        check(engine.metrics)
    assert not engine.has_unfinished
    times = first.times
    assert (times.arrived, times.scheduled, times.first_token, times.last_token, times.finished) == (
        100.0, 102.0, 102.0, 103.0, 103.0,
    )  # fmt: skip
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
    engine = Engine(tiny_model("hybrid"), max_num_seqs=3, max_model_len=64)
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
    engine, runner = make_engine(tiny_model("hybrid"), max_num_seqs=1, max_model_len=64)
    request, other = engine.add_request([1, 2], GREEDY), engine.add_request([3, 4, 5], GREEDY)
    engine.step()
    before = engine.metrics
    run = runner.run

    def fail(plan: StepPlan) -> None:
        run(plan)  # the model computes, routers count
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", fail)
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
    engine, runner = make_engine(model, max_num_seqs=2, max_model_len=256, num_blocks=12, prefix_cache=False)
    engine.generate(prompts, params)
    metrics = engine.metrics
    check(metrics)
    assert metrics.num_preemptions == engine.scheduler.num_preemptions > 0
    assert metrics.step_tokens.sum == runner.num_tokens > 2 * (40 + 99)
    assert metrics.prompt_tokens_computed == 40 * (2 + metrics.num_preemptions)
    assert metrics.output_tokens == 200
    assert metrics.queue_time.count == metrics.time_to_first_token.count == 2
    check_load(engine, runner.num_tokens)


def test_cached_prefixes() -> None:
    system = random_prompt(128, seed=0)
    engine, runner = make_engine(tiny_model("hybrid"), max_num_seqs=4, max_model_len=256, num_checkpoints=8)
    engine.generate([[*system, n, *range(30)] for n in range(16)], SamplingParams(max_tokens=3, ignore_eos=True))
    metrics = engine.metrics
    check(metrics)
    assert metrics.prompt_tokens_cached == 15 * 128
    assert metrics.prompt_tokens_computed == 16 * 159 - 15 * 128
    assert (metrics.prefix.num_requests, metrics.prefix.num_hits, metrics.prefix.tokens_hit) == (16, 15, 15 * 128)
    assert metrics.prefix.num_checkpoints_evicted > 0
    assert metrics.gauges.num_slots_cached == metrics.gauges.num_slots_used > 0
    assert metrics.gauges.num_blocks_cached == metrics.gauges.num_blocks_used >= 128 // 16
    assert metrics.step_tokens.sum == runner.num_tokens == metrics.prompt_tokens_computed + 16 * 2
    check_load(engine, runner.num_tokens)


def test_several_completions_are_several_requests() -> None:
    engine, runner = make_engine(tiny_model("hybrid"), max_num_seqs=4, max_model_len=256)
    engine.generate([random_prompt(70, seed=3)], SamplingParams(n=3, max_tokens=5, ignore_eos=True, temperature=1.0))
    metrics = engine.metrics
    check(metrics)
    assert (metrics.num_requests, metrics.finished, metrics.output_tokens) == (3, FinishCounts(length=3), 15)
    assert metrics.prompt_tokens_computed + metrics.prompt_tokens_cached == 3 * 70
    # The reference goes on from multiples of 64 only.
    assert metrics.prompt_tokens_cached == 2 * (69 if backend.native_module() is not None else 64)
    check_load(engine, runner.num_tokens)


@pytest.mark.parametrize("name", ["tiny", NATIVE])
def test_drafts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    model = tiny_model("hybrid") if name == "tiny" else make_in_form(name, "float32")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (plain,) = Engine(model, max_num_seqs=1, max_model_len=64).generate([[1, 2, 3]], params)
    wanted = plain.output_ids
    wrong = (wanted[6] + 1) % model.config.vocab_size
    engine, runner = make_engine(model, max_num_seqs=2, max_model_len=64, max_draft_tokens=3)
    other = engine.add_request([4, 5], params)
    request = engine.add_request([1, 2, 3], params)
    engine.step()
    proposals = [wanted[1:4], (wanted[5], wrong, wanted[7]), (), (*wanted[8:11], 0)]
    counts = [(3, 3, 5), (6, 4, 7), (6, 4, 8), (9, 7, 12)]
    for drafts, expected in zip(proposals, counts, strict=True):
        now += 1.0
        request.drafts = drafts
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
    assert metrics.step_tokens.sum == runner.num_tokens == 5 + (4 + 1) + (4 + 1) + (1 + 1) + (4 + 1)
    check_load(engine, runner.num_tokens)


def test_a_draft_that_ends_the_answer_is_accepted() -> None:
    model = tiny_model("hybrid")
    wanted = Engine(model, max_num_seqs=1, max_model_len=64).generate([[1, 2, 3]], GREEDY)[0].output_ids
    assert wanted[2] not in wanted[:2]
    engine = Engine(model, max_num_seqs=1, max_model_len=64, max_draft_tokens=3)
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(wanted[2],))
    request = engine.add_request([1, 2, 3], params)
    engine.step()
    request.drafts = wanted[1:4]
    engine.step()
    assert request.finish_reason == "stop" and (request.num_drafted, request.num_accepted) == (3, 2)


def test_drafts_of_an_answer_that_fails_are_not_accepted() -> None:
    """The guide refuses after two right drafts; the request ends and gets none of them."""
    model = tiny_model("hybrid")
    params = SamplingParams(max_tokens=20)
    wanted = Engine(model, max_num_seqs=1, max_model_len=64).generate([[1, 2, 3]], params)[0].output_ids
    engine = Engine(model, max_num_seqs=1, max_model_len=64, max_draft_tokens=3)
    request = engine.add_request([1, 2, 3], params, guide=Refusing())
    engine.step()
    request.drafts = wanted[1:4]
    engine.step()
    assert request.finish_reason == "error" and request.output_ids == [wanted[0]]
    assert (engine.metrics.drafted_tokens, engine.metrics.accepted_tokens) == (3, 0)
    check(engine.metrics)


# ---- experts ----


def check_load(engine: Engine, num_tokens: int) -> None:
    """Each token that was computed went to top-k experts of every sparse layer."""
    config = engine.model.config
    load = engine.expert_load(10**6)
    assert load is not None
    assert [layer.layer_index for layer in load.layers] == [
        n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)
    ]
    assert {sum(layer.tokens) for layer in load.layers} == {config.num_experts_per_tok * num_tokens}


def play(engine: Engine, *, seed: int, with_drafts: bool) -> list[Request]:
    """Traffic with everything in it; the same for every engine of a model."""
    rng = random.Random(seed)
    requests: list[Request] = []
    system = random_prompt(80, seed=seed)
    metrics = engine.metrics
    while len(requests) < 14 or engine.has_unfinished:
        if len(requests) < 14 and rng.random() < 0.5:
            head = system[: rng.choice((0, 64, 80))]
            prompt = [*head, *random_prompt(rng.randint(1, 40), seed=len(requests))]
            params = SamplingParams(
                max_tokens=rng.randint(1, 70), temperature=float(rng.random() < 0.5), seed=rng.getrandbits(9)
            )
            requests.append(engine.add_request(prompt, params))
        if requests and rng.random() < 0.05:
            engine.abort(rng.choice(requests).id)
        for request in requests:
            if with_drafts and request.output_ids and request.finish_reason is None:
                request.drafts = tuple(rng.randrange(90) for _ in range(rng.randint(0, 3)))
        engine.step()
        before, metrics = metrics, engine.metrics
        check(metrics)
        check_grown(before, metrics)
    return requests


def model_named(name: str) -> CausalLM:
    if name == "tiny":
        return tiny_model("hybrid")
    if name == "int4":
        if backend.native_module() is None:
            pytest.skip("quantised weights lie otherwise without native kernels")
        return make_in_form(NATIVE, "int4-g32")
    return make_in_form(name, "float32")


@pytest.mark.parametrize("with_drafts", [False, True])
@pytest.mark.parametrize("name", [NATIVE, DENSE_LAYERS, "int4", "tiny"])
def test_experts_are_counted_exactly(name: str, with_drafts: bool) -> None:
    """Against a count in Python by hooks, which keep that engine from recording its steps."""
    model = model_named(name)
    options: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 256, "num_blocks": 13, "num_checkpoints": 2}
    if with_drafts:
        options["max_draft_tokens"] = 3
    engine, runner = make_engine(model, **options)
    answers = [request.output_ids for request in play(engine, seed=5, with_drafts=with_drafts)]
    assert engine.metrics.prompt_tokens_cached
    assert engine.metrics.num_preemptions or backend.native_module() is None
    if backend.native_module() is not None and name in (NATIVE, "int4"):
        assert runner._decoding._batches, "steps are recorded while their tokens are counted"

    plain, plain_runner = make_engine(model, **options, count_experts=False)
    seen: dict[int, Counter[int]] = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _, __, out, n=n: seen.setdefault(n, Counter()).update(out.routing.experts_TA.flatten().tolist())
        )
        for n, layer in enumerate(model.model.layers)
        if model.config.is_moe_layer(n)
    ]
    try:
        assert [request.output_ids for request in play(plain, seed=5, with_drafts=with_drafts)] == answers
    finally:
        for hook in hooks:
            hook.remove()
    assert not plain_runner._decoding._batches and plain.expert_load() is None
    for ours, theirs in zip(runner.rows, plain_runner.rows, strict=True):
        assert torch.equal(ours, theirs), "counting changes no bit"
    load = engine.expert_load()
    assert load is not None
    num_experts = model.config.num_experts
    assert {layer.layer_index: layer.tokens for layer in load.layers} == {
        n: tuple(counts[e] for e in range(num_experts)) for n, counts in seen.items()
    }
    check_load(engine, runner.num_tokens)
    assert plain.metrics.step_tokens == engine.metrics.step_tokens


def test_the_last_steps() -> None:
    model = make_in_form(NATIVE, "float32")
    engine = Engine(model, max_num_seqs=1, max_model_len=128)
    engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=80, ignore_eos=True))
    empty = engine.expert_load(3)
    assert empty is not None and (empty.num_steps, empty.num_recent_steps) == (0, 0)
    assert all(layer.num_dead == 8 and layer.entropy == 1.0 for layer in empty.layers)
    totals, recents = [empty], []
    while engine.has_unfinished:
        engine.step()
        load = engine.expert_load(1)
        assert load is not None and load.num_recent_steps == 1
        totals.append(load)
        recents.append(load)
    assert recents[0].num_steps == 1 and totals[-1].num_steps == len(recents) == 80
    for n, (before, load) in enumerate(zip(totals, recents, strict=False)):
        for old, layer in zip(before.layers, load.layers, strict=True):
            assert layer.recent == tuple(b - a for a, b in zip(old.tokens, layer.tokens, strict=True))
            assert sum(layer.recent) == 3 * (5 if n == 0 else 1)
            assert set(layer.recent) <= {0, 1} or n == 0
    for num_steps, expected in ((0, 0), (7, 7), (1000, 64)):
        last = engine.expert_load(num_steps)
        assert last is not None and last.num_recent_steps == expected
        for old, layer in zip(totals[80 - expected].layers, last.layers, strict=True):
            assert layer.recent == tuple(b - a for a, b in zip(old.tokens, layer.tokens, strict=True))


def test_entropy_and_dead_experts() -> None:
    """All scores alike: the lowest indices are chosen, three of eight."""
    model = make_model(next_config())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight.zero_()
    engine = Engine(model, max_num_seqs=1, max_model_len=64)
    engine.generate([[1, 2, 3]], GREEDY)
    load = engine.expert_load()
    assert load is not None
    for layer in load.layers:
        assert sorted(layer.tokens) == [0] * 5 + [6] * 3 and layer.num_dead == 5
        assert layer.entropy == pytest.approx(torch.tensor(3.0).log().item() / torch.tensor(8.0).log().item())


def test_engines_of_one_model_count_for_themselves() -> None:
    model = make_in_form(NATIVE, "float32")
    engines = [Engine(model, max_num_seqs=1, max_model_len=64) for _ in range(2)]
    for engine, length in zip(engines, (5, 9), strict=True):
        engine.add_request(random_prompt(length, seed=length), GREEDY)
    while any(engine.has_unfinished for engine in engines):
        for engine in engines:
            engine.step()
    logits_of(model, random_tokens(model.config, 20))  # past the engines: not counted
    check_load(engines[0], 5 + 3)
    check_load(engines[1], 9 + 3)


@torch.inference_mode()
def test_the_router_of_the_mtp_layer_counts_as_the_last_one() -> None:
    model = make_model(next_config(num_nextn_predict_layers=1))
    engine = Engine(model, max_num_seqs=1, max_model_len=64)
    mtp_index = model.config.num_hidden_layers
    assert list(engine.cache.expert_load) == list(range(mtp_index + 1))
    tokens_T = random_tokens(model.config, 9)
    serving = OneRequest(model, 32)
    batch = serving.batch(tokens_T)
    assert batch.cache is not None
    counted = Batch(
        batch.token_ids_T, batch.positions_T, batch.packing, replace(batch.cache, expert_load=engine.cache.expert_load)
    )
    trunk = model(counted)
    assert [int(engine.cache.expert_load[n].sum()) for n in range(mtp_index + 1)] == [27] * mtp_index + [0]
    model.draft_hidden(tokens_T.roll(-1), trunk, counted)
    assert int(engine.cache.expert_load[mtp_index].sum()) == 27
    engine.generate([[1, 2]], SamplingParams(max_tokens=1, ignore_eos=True))
    load = engine.expert_load()
    assert load is not None
    assert [sum(layer.tokens) for layer in load.layers] == [27 + 6] * mtp_index + [27]


def test_a_dense_model_has_no_experts() -> None:
    engine = Engine(tiny_model("dense"), max_num_seqs=1, max_model_len=64)
    engine.generate([[1, 2]], GREEDY)
    assert engine.expert_load() is None and engine.metrics.output_tokens == 4


# ---- snapshots ----


def test_a_snapshot_never_changes_and_is_plain() -> None:
    engine = Engine(tiny_model("hybrid"), max_num_seqs=2, max_model_len=128)
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
    engine = Engine(make_in_form(NATIVE, "float32"), max_num_seqs=3, max_model_len=128)
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
