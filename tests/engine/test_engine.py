"""Whatever way the engine takes, a request gets what the bare model would give it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from qnext.engine import Engine, EngineConfig, Request, SampledToken, SamplingParams
from qnext.engine.policy.prefix import Hit
from qnext.engine.policy.step import StepPlan
from qnext.engine.sampling.seeds import child_seed
from qnext.errors import DoesNotFit, NotFinite, UsageError
from qnext.ops import DELTA_CHUNK_SIZE
from tests.engine.executors import KeepingExecutor
from tests.engine.models import KINDS, VOCAB_SIZE, random_prompt, reference_greedy, reference_logits, tiny_model

LENGTHS = (1, 5, 63, 64, 65, 130, 17, 200)


GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def recorded(kind: str, prompts: list[list[int]], **sizes: int) -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
    """Greedy outputs and the logits [num outputs, Y] behind them."""
    engine = Engine.of(tiny_model(kind), EngineConfig(poison=True, **sizes))
    executor = KeepingExecutor(engine)
    completions = engine.generate(prompts, GREEDY)
    engine.check_integrity()
    return [c.output_ids for c in completions], [torch.stack(executor.rows[c.request_id]) for c in completions]


def test_cached_decode_equals_full_recomputation(kind: str) -> None:
    model = tiny_model(kind)
    prompts = [random_prompt(length, seed=length) for length in (1, 64, 75)]
    outputs, logits = recorded(kind, prompts, max_num_seqs=1, max_num_batched_tokens=256)
    for prompt, output, rows in zip(prompts, outputs, logits, strict=True):
        assert output == reference_greedy(model, prompt, GREEDY.max_tokens)
        reference = reference_logits(model, [*prompt, *output[:-1]])[len(prompt) - 1 :]
        torch.testing.assert_close(rows, reference, rtol=1e-4, atol=1e-4)


def test_batched_equals_alone(kind: str) -> None:
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    together, together_logits = recorded(kind, prompts, max_num_seqs=8, max_num_batched_tokens=150)
    for prompt, output, rows in zip(prompts, together, together_logits, strict=True):
        (alone,), (alone_rows,) = recorded(kind, [prompt], max_num_seqs=1, max_num_batched_tokens=1024)
        assert output == alone
        torch.testing.assert_close(rows, alone_rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", sorted({DELTA_CHUNK_SIZE, 64, 128}))
def test_chunked_prefill_equals_whole(kind: str, chunk: int) -> None:
    prompts = [random_prompt(length, seed=length) for length in (64, 130, 257)]
    whole, whole_logits = recorded(kind, prompts, max_num_seqs=1, max_num_batched_tokens=512)
    chunked, chunked_logits = recorded(kind, prompts, max_num_seqs=1, max_num_batched_tokens=chunk)
    assert chunked == whole
    for rows, expected in zip(chunked_logits, whole_logits, strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_prefill_token_by_token_equals_whole(kind: str) -> None:
    prompt = random_prompt(70, seed=0)
    engine = Engine.of(tiny_model(kind), EngineConfig(max_num_seqs=1, max_num_batched_tokens=64, poison=True))
    # A prompt of one token and the rest forced in as if it had been chosen: every step has one token.
    executor = KeepingExecutor(engine)
    request = engine.add_request(prompt[:1], SamplingParams(max_tokens=100, ignore_eos=True))
    for token in prompt[1:]:
        engine.step()
        request.output_ids[-1] = token
    engine.step()
    expected = reference_logits(tiny_model(kind), prompt)
    torch.testing.assert_close(torch.stack(executor.rows[request.id]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_freed_memory_never_changes_an_answer(kind: str) -> None:
    """Two waves through a cache that is just large enough; without poison the second wave finds real leftovers."""
    prompts = [random_prompt(length, seed=100 + length) for length in (33, 90, 20, 65, 7)]
    fresh = [recorded(kind, [prompt], max_num_seqs=1, max_num_batched_tokens=512)[0][0] for prompt in prompts]
    for poison in (False, True):
        engine = Engine.of(
            tiny_model(kind), EngineConfig(max_num_seqs=2, max_num_batched_tokens=128, num_blocks=14, poison=poison)
        )
        for _ in range(2):
            assert [c.output_ids for c in engine.generate(prompts, GREEDY)] == fresh
    engine.check_integrity()


def test_poison_would_be_seen(kind: str) -> None:
    """The poison of the tests above is real: whoever reads memory that was not written gets NaN."""
    engine = Engine.of(tiny_model(kind), EngineConfig(max_num_seqs=1, max_num_batched_tokens=64, poison=True))
    assert engine.scheduler.prefixes is not None
    engine.scheduler.prefixes.acquire = lambda *_, **__: Hit(5, (), None, None)  # claims that five tokens are cached
    with pytest.raises(NotFinite, match="not finite"):
        engine.generate([random_prompt(20, seed=1)], GREEDY)
    engine.check_integrity()


def assert_nothing_is_held(engine: Engine) -> None:
    """But by the prefix cache."""
    engine.step()  # copies that are left
    if engine.scheduler.prefixes is not None:
        engine.scheduler.prefixes.clear()
    assert engine.scheduler.blocks.num_used == engine.scheduler.slots.num_used == 0


def test_seed_decides_whatever_the_company(kind: str) -> None:
    prompt = random_prompt(40, seed=2)
    params = SamplingParams(temperature=1.3, top_k=50, top_p=0.9, seed=1234, max_tokens=20, ignore_eos=True)
    (alone,) = Engine.of(tiny_model(kind), EngineConfig(max_num_seqs=1)).generate([prompt], params)
    others = [SamplingParams(temperature=0.7 + 0.1 * n, seed=n, max_tokens=9 + n, top_k=3 * n) for n in range(5)]
    prompts = [random_prompt(11 + n, seed=n) for n in range(5)]
    engine = Engine.of(tiny_model(kind), EngineConfig(max_num_seqs=6, max_num_batched_tokens=70))
    company = engine.generate([*prompts, prompt], [*others, params])
    assert company[-1].output_ids == alone.output_ids
    (other,) = engine.generate([prompt], SamplingParams(temperature=1.3, seed=1235, max_tokens=20, ignore_eos=True))
    assert other.output_ids != alone.output_ids


def test_a_seed_that_was_drawn_reproduces_its_tokens() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2))
    first, second = engine.generate([[5, 6, 7]] * 2, SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True))
    assert first.seed != second.seed and first.output_ids != second.output_ids
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True, seed=first.seed)
    assert engine.generate([[5, 6, 7]], params)[0].output_ids == first.output_ids


def test_stop_tokens_end_a_request() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1))
    prompt = random_prompt(30, seed=4)
    (full,) = engine.generate([prompt], GREEDY)
    assert full.finish_reason == "length" and len(full.output_ids) == 8
    token = full.output_ids[4]
    expected = full.output_ids[: full.output_ids.index(token) + 1]
    (stopped,) = engine.generate([prompt], SamplingParams(max_tokens=8, stop_token_ids=(token,), ignore_eos=True))
    assert (stopped.output_ids, stopped.finish_reason) == (expected, "stop")
    with_eos = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, eos_token_ids=[token]))
    (stopped,) = with_eos.generate([prompt], SamplingParams(max_tokens=8))
    assert (stopped.output_ids, stopped.finish_reason) == (expected, "stop")
    assert with_eos.generate([prompt], GREEDY)[0].finish_reason == "length"


def test_abort_in_every_phase_leaks_nothing(kind: str) -> None:
    engine = Engine.of(
        tiny_model(kind), EngineConfig(max_num_seqs=2, max_num_batched_tokens=65, num_blocks=30, poison=True)
    )
    survivor = engine.add_request(random_prompt(20, seed=1), GREEDY, request_id="survivor")
    reading = engine.add_request(random_prompt(200, seed=2), GREEDY, request_id="reading")
    waiting = engine.add_request(random_prompt(9, seed=3), GREEDY, request_id="waiting")
    engine.step()
    engine.step()
    computed = {name: each.num_computed_tokens for name, each in engine.scheduler.sequences.items()}
    assert 0 < computed["reading"] < 200 and computed["waiting"] == 0
    for request_id in ("reading", "waiting", "reading", "unknown"):
        engine.abort(request_id)
        engine.check_integrity()
    assert reading.finish_reason == waiting.finish_reason == "abort"
    decoding = engine.add_request(random_prompt(9, seed=5), GREEDY, request_id="decoding")
    for _ in range(3):
        engine.step()
    assert decoding.output_ids
    engine.abort("decoding")
    engine.check_integrity()
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert_nothing_is_held(engine)
    assert tuple(survivor.output_ids) == reference_greedy(tiny_model(kind), list(survivor.prompt_ids), 8)


def test_random_traffic_leaks_nothing_and_answers_alike() -> None:
    """Five hundred requests through a small poisoned cache, a part of them aborted somewhere on the way."""
    rng = random.Random(0)
    engine = Engine.of(
        tiny_model("dense"), EngineConfig(max_num_seqs=16, max_num_batched_tokens=160, num_blocks=32, poison=True)
    )
    requests: list[Request] = []
    while len(requests) < 500 or engine.has_unfinished:
        if len(requests) < 500:
            for _ in range(rng.randint(1, 12)):
                params = SamplingParams(
                    temperature=rng.choice([0.0, 1.2]),
                    top_k=rng.choice([0, 7]),
                    seed=len(requests),
                    max_tokens=rng.randint(1, 5),
                    repetition_penalty=rng.choice([1.0, 1.3]),
                )
                prompt = random_prompt(rng.choice([1, 3, 15, 16, 40, 70]), seed=len(requests))
                requests.append(engine.add_request(prompt, params))
        if rng.random() < 0.2:
            engine.abort(rng.choice(requests[-20:]).id)
        engine.step()
        engine.check_integrity()
    assert_nothing_is_held(engine)
    assert {r.finish_reason for r in requests} >= {"length", "abort"}
    alone = Engine.of(tiny_model("dense"), EngineConfig(max_num_seqs=1))
    for request in [r for r in requests if r.finish_reason != "abort"][::25]:
        (expected,) = alone.generate([request.prompt_ids], request.params)
        assert expected.output_ids == tuple(request.output_ids)


def test_stream_gives_the_tokens_and_closing_it_aborts() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2))
    prompt = random_prompt(30, seed=4)
    (expected,) = engine.generate([prompt], GREEDY)
    events = list(engine.stream(prompt, GREEDY))
    assert tuple(event.token.token_id for event in events) == expected.output_ids
    assert [event.finish_reason for event in events] == [None] * 7 + ["length"]
    stream = engine.stream(prompt, GREEDY)
    next(stream)
    assert engine.has_unfinished
    stream.close()
    assert not engine.has_unfinished
    engine.check_integrity()


def test_a_refused_request_leaves_the_others_alone() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2, max_model_len=100, num_blocks=7))
    good = engine.add_request(random_prompt(20, seed=1), GREEDY)
    engine.step()
    with pytest.raises(UsageError, match="empty"):
        engine.add_request([])
    with pytest.raises(UsageError, match=f"token 1 is {VOCAB_SIZE}"):
        engine.add_request([0, VOCAB_SIZE])
    with pytest.raises(UsageError, match="in use"):
        engine.add_request([1], request_id=good.id)
    with pytest.raises(DoesNotFit, match="at most 99 tokens would fit"):
        engine.add_request([1] * 100)
    with pytest.raises(DoesNotFit, match="max_tokens 50 would fit"):
        engine.add_request([1] * 50, SamplingParams(max_tokens=51))
    with pytest.raises(DoesNotFit):
        engine.generate([[1], [1] * 100], SamplingParams(max_tokens=3))
    while engine.has_unfinished:
        engine.step()
    engine.check_integrity()
    assert tuple(good.output_ids) == reference_greedy(tiny_model("hybrid"), list(good.prompt_ids), 8)


def test_a_request_may_fill_the_context_to_the_last_token() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, max_model_len=80, num_blocks=5, poison=True))
    (done,) = engine.generate([random_prompt(70, seed=1)], SamplingParams(ignore_eos=True))
    assert len(done.output_ids) == 10 and done.finish_reason == "length"
    (done,) = engine.generate([random_prompt(79, seed=1)], SamplingParams(ignore_eos=True))
    assert len(done.output_ids) == 1


def test_a_failing_step_ends_its_only_request_and_no_other() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, poison=True))
    failing = engine.add_request([1, 2, 3], GREEDY)
    waiting = engine.add_request([4, 5, 6], GREEDY)
    executor, engine.executor = engine.executor, None  # type: ignore[assignment]
    (event,) = engine.step()
    assert (event.request_id, event.finish_reason) == (failing.id, "error")
    engine.executor = executor
    engine.check_integrity()
    assert isinstance(failing.fault, AttributeError) and waiting.finish_reason is None
    while engine.has_unfinished:
        engine.step()
    assert tuple(waiting.output_ids) == reference_greedy(tiny_model("hybrid"), [4, 5, 6], 8)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    model = tiny_model("hybrid")
    prompt = random_prompt(10, seed=9)
    params = SamplingParams(
        temperature=2.0, top_k=20, repetition_penalty=1.5, seed=3, max_tokens=6, logprobs=4, ignore_eos=True
    )
    (done,) = Engine.of(model, EngineConfig(max_num_seqs=1)).generate([prompt], params)
    expected = reference_logits(model, [*prompt, *done.output_ids])[9:-1].log_softmax(-1)
    assert [token.token_id for token in done.sampled] == list(done.output_ids)
    for token, row in zip(done.sampled, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        values, ids = row.topk(4)
        assert [token_id for token_id, _ in token.top_logprobs] == ids.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)


def test_n_completions_are_n_requests_with_their_seeds() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=4))
    prompts = [random_prompt(20, seed=1), random_prompt(33, seed=2)]
    params = SamplingParams(temperature=1.4, seed=77, max_tokens=12, ignore_eos=True, n=3, prompt_logprobs=1)
    found = engine.generate(prompts, params)
    assert [c.index for c in found] == [0, 1, 2, 0, 1, 2]
    assert [c.seed for c in found] == [child_seed(77, index) for index in range(3)] * 2 and found[0].seed == 77
    assert len({c.output_ids for c in found}) == 6 and len({c.request_id for c in found}) == 6
    assert [len(c.prompt_sampled) for c in found] == [20, 0, 0, 33, 0, 0]
    for completion in found:
        alone = replace(params, n=1, seed=completion.seed)
        assert engine.generate([completion.prompt_ids], alone)[0].output_ids == completion.output_ids
    drawn = engine.generate(prompts[:1], replace(params, seed=None, n=2))
    assert drawn[1].seed == child_seed(drawn[0].seed, 1) and drawn[0].output_ids != drawn[1].output_ids
    engine.check_integrity()


def test_several_completions_are_queued_all_or_none() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2))
    requests = engine.add_requests([1, 2], SamplingParams(n=2, max_tokens=2), request_id="a")
    assert [request.id for request in requests] == ["a-0", "a-1"]
    engine.add_request([1], SamplingParams(max_tokens=1), request_id="b-1")
    with pytest.raises(UsageError, match="b-1"):
        engine.add_requests([1, 2], SamplingParams(n=2, max_tokens=2), request_id="b")
    assert engine.scheduler.num_waiting == 3
    for call in (engine.add_request, engine.stream):
        with pytest.raises(UsageError, match="n is 2"):
            call([1], SamplingParams(n=2))
    (single,) = engine.add_requests([1], SamplingParams(max_tokens=1), request_id="c")
    assert single.id == "c"
    while engine.has_unfinished:
        engine.step()
    engine.check_integrity()


def test_prompt_logprobs_are_those_of_the_bare_model(kind: str) -> None:
    """In chunks and in company, over prompts of one token, of a chunk and of more than are computed at once."""
    model = tiny_model(kind)
    prompts = [random_prompt(length, seed=length) for length in (1, 64, 200, 65, 300)]
    each = [SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=None if n == 1 else n) for n in range(5)]
    completions = Engine.of(model, EngineConfig(max_num_seqs=5, max_num_batched_tokens=140, poison=True)).generate(
        prompts, each
    )
    assert completions[1].prompt_sampled == ()
    for prompt, params, done in zip(prompts, each, completions, strict=True):
        if params.prompt_logprobs is None:
            continue
        first, *others = done.prompt_sampled
        assert first == SampledToken(prompt[0])
        assert [token.token_id for token in others] == prompt[1:]
        expected = reference_logits(model, prompt).log_softmax(-1)
        for token, row in zip(others, expected, strict=False):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
            assert [value for _, value in token.top_logprobs] == pytest.approx(
                row.topk(params.prompt_logprobs).values.tolist(), abs=1e-4
            )
            for other, value in token.top_logprobs:
                assert value == pytest.approx(float(row[other]), abs=1e-4)


def test_parameters_are_checked_against_vocabulary_and_stop_tokens() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1))
    with pytest.raises(UsageError, match=f"logit_bias: token {VOCAB_SIZE}"):
        engine.add_request([1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}))
    with pytest.raises(UsageError, match="min_tokens 1"):
        engine.add_request([1], SamplingParams(allowed_token_ids=(3,), min_tokens=1))
    params = SamplingParams(allowed_token_ids=(3,), min_tokens=1, max_tokens=2, ignore_eos=True)
    assert engine.generate([[1]], params)[0].output_ids == (3, 3)
    (done,) = engine.generate([[1]], SamplingParams(logit_bias={3: 100}, min_tokens=4, max_tokens=9))
    assert len(done.output_ids) == 5 and done.output_ids[-1] == 3 and done.finish_reason == "stop"
    assert 3 not in done.output_ids[:-1]


def test_a_request_without_any_choice_is_aborted_alone() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2))
    run = engine.executor.execute

    def spoiled(plan: StepPlan):  # type: ignore[no-untyped-def]
        output = run(plan)
        logits = output.logits_RY.clone()
        logits[:, 5] = -torch.inf
        return output._replace(logits_RY=logits)

    engine.executor.execute = spoiled  # type: ignore[method-assign]
    only_five = SamplingParams(allowed_token_ids=(5,), max_tokens=4)
    lost, good = engine.generate([[1, 2], [1, 2]], [only_five, GREEDY])
    assert (lost.finish_reason, lost.output_ids) == ("error", ())
    assert good.finish_reason == "length" and len(good.output_ids) == 8
    engine.check_integrity()
