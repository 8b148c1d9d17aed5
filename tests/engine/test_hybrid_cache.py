"""Whatever is cached, evicted, sent back or batched: a request gets what it would get alone."""

from __future__ import annotations

import gc
import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.policy.recovery import Recovery
from qnext.engine.policy.step import SequencePlan
from qnext.ops import backends
from tests.engine.conversations import MAX_LEN, SOME_SCHEDULES, alone, check, run_traffic, step_that_fails
from tests.engine.executors import local
from tests.engine.models import KINDS, NATIVE, needs_native, tiny_model
from tests.model.models import make_in_form


@needs_native
@pytest.mark.parametrize(("form", "seed"), SOME_SCHEDULES)
def test_random_schedules_give_the_same_bits(form: str, seed: int) -> None:
    answers, engine = run_traffic(make_in_form(NATIVE, form), seed=seed, num_requests=30)
    assert engine.scheduler.prefixes is not None
    statistics = engine.scheduler.prefixes.statistics
    assert statistics.tokens_hit > 0 and statistics.num_checkpoints_evicted > 0
    check(answers)
    for answer in answers:
        if answer.rows:
            assert torch.equal(torch.stack(answer.rows), answer.wanted_rows[: len(answer.rows)])


NUMS_REQUESTS = [12, pytest.param(25, marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_requests", NUMS_REQUESTS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_schedules_of_every_kind_of_model(kind: str, num_requests: int) -> None:
    answers, _ = run_traffic(tiny_model(kind), seed=len(kind), num_requests=num_requests)
    check(answers)
    for answer in answers:
        if answer.rows:
            wanted = answer.wanted_rows[: len(answer.rows)]
            torch.testing.assert_close(torch.stack(answer.rows), wanted, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
def test_drafts_right_and_wrong_change_no_answer(form: str) -> None:
    """Greedy and random answers, with shared prefixes, requests sent back, and windows cut short."""
    answers, engine = run_traffic(make_in_form(NATIVE, form), seed=7, num_requests=30, max_draft_tokens=3)
    check(answers)
    assert any(size[1] > size[0] for size in local(engine)._decoding._batches), "windows are recorded as well"


@pytest.mark.parametrize("kind", ["hybrid", "linear"])
def test_drafts_on_the_reference(kind: str) -> None:
    check(run_traffic(tiny_model(kind), seed=11, num_requests=20, max_draft_tokens=3)[0])


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
def test_many_random_schedules(form: str) -> None:
    """Seventy of each, with drafts, failing steps and everything else; the memory of the process stays.

    It rises and falls by a mapping of 256 MiB, which many engines share, so that highest is compared with highest.
    """
    model = make_in_form(NATIVE, form)
    resident = []
    for seed in range(100, 170):
        check(
            run_traffic(model, seed=seed, num_requests=60, max_draft_tokens=seed % 4, failure_rate=0.01 * (seed % 3))[
                0
            ],
            min_complete=0.2,
        )
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert max(resident[35:]) < max(resident[:35]) + (64 << 20)


def test_a_request_that_was_sent_back_answers_alike() -> None:
    """Two answers grow until the blocks are gone: the younger one goes back, and on from its checkpoint."""
    model = tiny_model("hybrid")
    engine = Engine.of(model, EngineConfig(max_num_seqs=2, max_model_len=MAX_LEN, num_blocks=12, poison=True))
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [list(range(1, 41)), list(range(2, 42))]
    completions = engine.generate(prompts, params)
    assert engine.scheduler.num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.output_ids) == alone(model, prompt, params, 100)[0]
    engine.check_integrity()


def test_a_prefix_of_many_is_computed_once() -> None:
    model = tiny_model("hybrid")
    engine = Engine.of(model, EngineConfig(max_num_seqs=4, max_model_len=MAX_LEN, num_checkpoints=8))
    system = [int(t) for t in torch.randint(0, 97, (128,), generator=torch.Generator().manual_seed(0))]
    prompts = [[*system, n, *range(30)] for n in range(16)]
    completions = engine.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    assert [c.num_cached_tokens for c in completions] == [0] + [128] * 15


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_step_leaves_what_others_cached(kind: str, in_forward: bool) -> None:
    """What was computed before stays, and is right; what the failed step was to copy is not taken for a state."""
    model = tiny_model(kind)
    engine = Engine.of(
        model,
        EngineConfig(
            max_num_seqs=2, max_model_len=MAX_LEN, max_num_batched_tokens=70, checkpoint_interval=64, poison=True
        ),
    )
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    old, new = [list(range(start, start + 90)) for start in (0, 5)]
    wanted = [alone(model, prompt, params, 3)[0] for prompt in (old, new)]
    assert list(engine.generate([old], params)[0].output_ids) == wanted[0]
    failed = engine.add_request(new, params)
    engine.step()
    assert 0 < engine.scheduler.sequences[failed.id].num_computed_tokens < 90
    step_that_fails(engine, in_forward=in_forward)
    engine.check_integrity()
    assert failed.finish_reason == "error" and not failed.output_ids
    first, second = engine.generate([old, new], params)
    assert [list(first.output_ids), list(second.output_ids)] == wanted
    assert first.num_cached_tokens >= 64
    # Without states the blocks of the steps before are whole; with them the state was to be copied by the failed step.
    assert second.num_cached_tokens == (64 if kind == "full" else 0)


@pytest.mark.parametrize("num_requests", NUMS_REQUESTS)
@pytest.mark.parametrize("kind", KINDS)
def test_failing_steps_spoil_no_answer(kind: str, num_requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: list[str] = []
    usual = Recovery.blame

    def blame(self: Recovery, planned: Sequence[SequencePlan], most_tokens: Callable[[str], int]) -> str | None:
        apart.extend(s.request_id for s in planned if len(planned) > 1)
        return usual(self, planned, most_tokens)

    monkeypatch.setattr(Recovery, "blame", blame)
    answers, engine = run_traffic(tiny_model(kind), seed=3, num_requests=num_requests, failure_rate=0.05)
    requests = [answer.request for answer in answers]
    assert apart, "steps of several failed, and ran again"
    assert all(request.finish_reason in ("length", "abort", "error") for request in requests)
    assert engine.scheduler.prefixes is not None and engine.scheduler.prefixes.statistics.tokens_hit > 0
    check(answers, min_complete=0.4)


def test_salts_share_nothing() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, max_model_len=MAX_LEN))
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = list(range(1, 90))
    for salt, cached in (("a", 0), ("b", 0), ("a", 64), ("b", 64)):
        request = engine.add_request(prompt, params, salt=salt)
        while request.finish_reason is None:
            engine.step()
        grid_end = (len(prompt) - 1) // engine.scheduler.limits.chunk_size * engine.scheduler.limits.chunk_size
        assert request.num_cached_tokens == (grid_end if cached else 0)


def test_the_examples_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hybrid-cache.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    exec(blocks[0], {})
    model = make_in_form(NATIVE, "float32")
    if backends.cpu_kernels() is None:
        pytest.skip("the example counts tokens as native kernels cache them, at any token")
    exec("\n".join(blocks[1:]), {"model": model})
