"""Whatever is cached, evicted, sent back or batched: a request gets what it would get alone."""

from __future__ import annotations

import contextlib
import gc
import random
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, Request, SamplingParams
from qnext.engine.runner import Runner, RunnerOutput
from qnext.engine.step import StepPlan
from qnext.model import CausalLM
from qnext.ops import backend
from tests.engine.models import KINDS, tiny_model
from tests.model.models import make_in_form

NATIVE = "next, sizes of the native kernels"
MAX_LEN = 256


class KeepingRunner(Runner):
    """Keeps the logits of every chosen token of steps without drafts."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model, engine.cache)
        self.rows: dict[str, list[Tensor]] = {}

    def run(self, plan: StepPlan) -> RunnerOutput:
        output = super().run(plan)
        if not any(sequence.drafts for sequence in plan.sequences):
            for row, (request, *_) in zip(output.logits_RY, output.sequences, strict=True):
                self.rows.setdefault(request.id, []).append(row.clone())
        return output


class Conversations:
    """Random prompts that share beginnings: system prompts, turns of one conversation, the same prompt again."""

    def __init__(self, rng: random.Random, vocab_size: int) -> None:
        self.rng, self.vocab_size = rng, vocab_size
        self.systems = [self.tokens(length) for length in (70, 33, 96)]
        self.history: list[list[int]] = []

    def tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(length)]

    def prompt(self) -> list[int]:
        kind = self.rng.random()
        if self.history and kind < 0.4:
            base = self.rng.choice(self.history)
            base = base[: self.rng.randint(1, len(base))] if self.rng.random() < 0.3 else base
            prompt = base + self.tokens(self.rng.randint(1, 25))
        elif kind < 0.8:
            prompt = self.rng.choice(self.systems) + self.tokens(self.rng.randint(1, 40))
        else:
            prompt = self.tokens(self.rng.randint(1, 120))
        return prompt[: MAX_LEN - 30]

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.rng.randint(1, 25), ignore_eos=True, seed=self.rng.randrange(1000),
            temperature=self.rng.choice((0.0, 0.0, 1.0)),
        )  # fmt: skip


class Answer(NamedTuple):
    request: Request
    wanted: list[int]  # what it gets alone
    wanted_rows: Tensor
    rows: list[Tensor]


def run_traffic(
    model: CausalLM,
    *,
    seed: int,
    num_requests: int,
    max_draft_tokens: int = 0,
    state_dtype: torch.dtype = torch.float32,
    has_turns: bool = True,
    failure_rate: float = 0.0,
) -> tuple[list[Answer], Engine]:
    """Requests that come, go and are aborted at random on an engine that is far too small for them.

    Drafts are what the request would get alone, now and then spoiled. So many of the steps fail.
    """
    rng = random.Random(seed)
    engine = Engine(
        model, max_num_seqs=rng.randint(2, 5), max_model_len=MAX_LEN, num_blocks=rng.randint(17, 40),
        num_checkpoints=rng.randint(1, 8), max_num_batched_tokens=rng.choice((70, 100, 300)),
        checkpoint_interval=rng.choice((0, 50)), max_draft_tokens=max_draft_tokens, state_dtype=state_dtype,
        poison=True,
    )  # fmt: skip
    if engine.scheduler.prefixes is not None:
        engine.scheduler.prefixes.min_tokens = 4
    engine.runner = runner = KeepingRunner(engine)
    conversations = Conversations(rng, model.config.vocab_size)
    answers: list[Answer] = []
    while len(answers) < num_requests or engine.has_unfinished:
        for _ in range(rng.randint(0, 3) if len(answers) < num_requests else 0):
            prompt, params = conversations.prompt(), conversations.params()
            assert params.max_tokens is not None
            wanted, wanted_rows = alone(model, prompt, params, params.max_tokens, state_dtype)
            request = engine.add_request(prompt, params, salt=rng.choice(("", "", "b")))
            answers.append(Answer(request, wanted, wanted_rows, runner.rows.setdefault(request.id, [])))
            if has_turns:
                conversations.history.append(prompt + wanted)
        if rng.random() < 0.05 and engine.has_unfinished:
            engine.abort(rng.choice([a.request.id for a in answers[-8:]]))
        for request, wanted, _, _ in answers[-20:]:
            if max_draft_tokens and request.output_ids:
                next_ids = wanted[len(request.output_ids) :][: rng.randint(0, max_draft_tokens)]
                spoiled = rng.randrange(2 * max_draft_tokens)
                request.drafts = tuple(3 if i == spoiled else t for i, t in enumerate(next_ids))
        if rng.random() < failure_rate:
            step_that_fails(engine, in_forward=rng.random() < 0.7)
        else:
            engine.step()
        engine.check_integrity()
    return answers, engine


class Broken(Exception):
    pass


def step_that_fails(engine: Engine, *, in_forward: bool) -> None:
    """In the last layer of the model, or before anything is copied; a step without tokens does not fail."""

    def fail(*_: object) -> None:
        raise Broken

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Broken):
        if not in_forward:
            patch.setattr(engine.cache, "prepare", fail)
        hook = engine.model.model.layers[-1].register_forward_pre_hook(fail)
        try:
            engine.step()
        finally:
            hook.remove()


def alone(
    model: CausalLM,
    prompt: list[int],
    params: SamplingParams,
    num_tokens: int,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[list[int], Tensor]:
    engine = Engine(model, max_num_seqs=1, max_model_len=MAX_LEN, prefix_cache=False, state_dtype=state_dtype)
    engine.runner = runner = KeepingRunner(engine)
    completion = engine.generate([prompt], replace(params, max_tokens=num_tokens))[0]
    return list(completion.output_ids), torch.stack(runner.rows[completion.request_id])


needs_native = pytest.mark.skipif(
    backend.native_module() is None, reason="the native kernels are not built or not wanted"
)


@needs_native
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
@pytest.mark.parametrize("seed", range(2))
def test_random_schedules_give_the_same_bits(form: str, seed: int) -> None:
    answers, engine = run_traffic(make_in_form(NATIVE, form), seed=seed, num_requests=30)
    assert engine.scheduler.prefixes is not None
    statistics = engine.scheduler.prefixes.statistics
    assert statistics.tokens_hit > 0 and statistics.num_checkpoints_evicted > 0
    check(answers)
    for answer in answers:
        if answer.rows:
            assert torch.equal(torch.stack(answer.rows), answer.wanted_rows[: len(answer.rows)])


@pytest.mark.parametrize("kind", KINDS)
def test_random_schedules_of_every_kind_of_model(kind: str) -> None:
    answers, _ = run_traffic(tiny_model(kind), seed=len(kind), num_requests=25)
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
    assert any(size[1] > size[0] for size in engine.runner._decoding._batches), "windows are recorded as well"


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
            run_traffic(
                model, seed=seed, num_requests=60, max_draft_tokens=seed % 4, failure_rate=0.01 * (seed % 3)
            )[0],
            min_complete=0.2,
        )  # fmt: skip
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert max(resident[35:]) < max(resident[:35]) + (64 << 20)


def check(answers: list[Answer], *, min_complete: float = 0.5) -> None:
    assert sum(answer.request.finish_reason == "length" for answer in answers) > min_complete * len(answers)
    for request, wanted, _, _ in answers:
        assert request.output_ids == (
            wanted if request.finish_reason == "length" else wanted[: len(request.output_ids)]
        )


def test_a_request_that_was_sent_back_answers_alike() -> None:
    """Two answers grow until the blocks are gone: the younger one goes back, and on from its checkpoint."""
    model = tiny_model("hybrid")
    engine = Engine(model, max_num_seqs=2, max_model_len=MAX_LEN, num_blocks=12, poison=True)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [list(range(1, 41)), list(range(2, 42))]
    completions = engine.generate(prompts, params)
    assert engine.scheduler.num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.output_ids) == alone(model, prompt, params, 100)[0]
    engine.check_integrity()


def test_a_prefix_of_many_is_computed_once() -> None:
    model = tiny_model("hybrid")
    engine = Engine(model, max_num_seqs=4, max_model_len=MAX_LEN, num_checkpoints=8)
    system = [int(t) for t in torch.randint(0, 97, (128,), generator=torch.Generator().manual_seed(0))]
    prompts = [[*system, n, *range(30)] for n in range(16)]
    completions = engine.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    assert [c.num_cached_tokens for c in completions] == [0] + [128] * 15


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_step_leaves_what_others_cached(kind: str, in_forward: bool) -> None:
    """What was computed before stays, and is right; what the failed step was to copy is not taken for a state."""
    model = tiny_model(kind)
    engine = Engine(
        model, max_num_seqs=2, max_model_len=MAX_LEN, max_num_batched_tokens=70, checkpoint_interval=64, poison=True
    )  # fmt: skip
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    old, new = [list(range(start, start + 90)) for start in (0, 5)]
    wanted = [alone(model, prompt, params, 3)[0] for prompt in (old, new)]
    assert list(engine.generate([old], params)[0].output_ids) == wanted[0]
    failed = engine.add_request(new, params)
    engine.step()
    assert 0 < failed.num_computed_tokens < 90
    step_that_fails(engine, in_forward=in_forward)
    engine.check_integrity()
    assert failed.finish_reason == "error" and not failed.output_ids
    first, second = engine.generate([old, new], params)
    assert [list(first.output_ids), list(second.output_ids)] == wanted
    assert first.num_cached_tokens >= 64
    # Without states the blocks of the steps before are whole; with them the state was to be copied by the failed step.
    assert second.num_cached_tokens == (64 if kind == "full" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_failing_steps_spoil_no_answer(kind: str) -> None:
    answers, engine = run_traffic(tiny_model(kind), seed=3, num_requests=20, failure_rate=0.05)
    requests = [answer.request for answer in answers]
    assert any(request.apart_until for request in requests), "steps of several failed, and ran again"
    assert all(request.finish_reason in ("length", "abort", "error") for request in requests)
    assert engine.scheduler.prefixes is not None and engine.scheduler.prefixes.statistics.tokens_hit > 0
    check(answers, min_complete=0.4)


def test_salts_share_nothing() -> None:
    engine = Engine(tiny_model("hybrid"), max_num_seqs=1, max_model_len=MAX_LEN)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = list(range(1, 90))
    for salt, cached in (("a", 0), ("b", 0), ("a", 64), ("b", 64)):
        request = engine.add_request(prompt, params, salt=salt)
        while request.finish_reason is None:
            engine.step()
        grid_end = (len(prompt) - 1) // engine.scheduler.limits.chunk_size * engine.scheduler.limits.chunk_size
        assert request.num_cached_tokens == (grid_end if cached else 0)


def test_the_worked_example_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hybrid-cache.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    model = make_in_form(NATIVE, "float32")
    if backend.native_module() is None:
        pytest.skip("the example counts tokens as native kernels cache them, at any token")
    exec("\n".join(blocks), {"model": model})
