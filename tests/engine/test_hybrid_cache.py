"""Whatever is cached, evicted, sent back or batched: a request gets what it would get alone."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.engine import Completion, Engine, SamplingParams
from qnext.engine.runner import Runner, RunnerOutput
from qnext.engine.step import StepPlan
from qnext.model import CausalLM
from qnext.ops import backend
from tests.engine.models import KINDS, tiny_model
from tests.model.models import make_in_form

NATIVE = "next, sizes of the native kernels"
MAX_LEN = 256


class KeepingRunner(Runner):
    """Keeps the logits of every chosen token."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model, engine.cache)
        self.rows: dict[str, list[Tensor]] = {}

    def run(self, plan: StepPlan) -> RunnerOutput:
        output = super().run(plan)
        for row, request in zip(output.logits_RY, output.requests, strict=True):
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


def run_traffic(
    model: CausalLM, *, seed: int, num_requests: int, min_prefix_tokens: int
) -> tuple[list[tuple[list[int], SamplingParams, Completion, Tensor]], Engine]:
    """Requests that come, go and are aborted at random on an engine that is far too small for them."""
    rng = random.Random(seed)
    engine = Engine(
        model, max_num_seqs=rng.randint(2, 5), max_model_len=MAX_LEN, num_blocks=rng.randint(17, 40),
        num_checkpoints=rng.randint(1, 8), max_num_batched_tokens=rng.choice((70, 100, 300)),
        checkpoint_interval=rng.choice((0, 50)), poison=True,
    )  # fmt: skip
    if engine.scheduler.prefixes is not None:
        engine.scheduler.prefixes.min_tokens = min_prefix_tokens
    engine.runner = runner = KeepingRunner(engine)
    conversations = Conversations(rng, model.config.vocab_size)
    pending: dict[str, tuple[list[int], SamplingParams, object]] = {}
    done = []
    while len(done) < num_requests or pending:
        for _ in range(rng.randint(0, 3) if len(done) + len(pending) < num_requests else 0):
            prompt, params = conversations.prompt(), conversations.params()
            request = engine.add_request(prompt, params, salt=rng.choice(("", "", "b")))
            pending[request.id] = (prompt, params, request)
        if pending and rng.random() < 0.05:
            engine.abort(rng.choice(list(pending)))
        engine.step()
        engine.check_integrity()
        for key, (prompt, params, request) in list(pending.items()):
            if request.finish_reason is not None:  # type: ignore[attr-defined]
                del pending[key]
                output = list(request.output_ids)  # type: ignore[attr-defined]
                conversations.history.append(prompt + output)
                rows = runner.rows.get(key, [])[: len(output)]
                done.append((prompt, params, output, torch.stack(rows) if rows else None))
    return done, engine  # type: ignore[return-value]


def alone(model: CausalLM, prompt: list[int], params: SamplingParams, num_tokens: int) -> tuple[list[int], Tensor]:
    engine = Engine(model, max_num_seqs=1, max_model_len=MAX_LEN, prefix_cache=False)
    engine.runner = runner = KeepingRunner(engine)
    completion = engine.generate([prompt], replace(params, max_tokens=num_tokens))[0]
    return list(completion.output_ids), torch.stack(runner.rows[completion.request_id])


needs_native = pytest.mark.skipif(
    backend.native_module() is None, reason="the native kernels are not built or not wanted"
)


@needs_native
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
@pytest.mark.parametrize("seed", range(3))
def test_random_schedules_give_the_same_bits(form: str, seed: int) -> None:
    model = make_in_form(NATIVE, form)
    done, engine = run_traffic(model, seed=seed, num_requests=40, min_prefix_tokens=4)
    statistics = engine.scheduler.prefixes.statistics  # type: ignore[union-attr]
    assert statistics.tokens_hit > 0 and statistics.num_checkpoints_evicted > 0
    for prompt, params, output, rows in done:
        if output:
            wanted, wanted_rows = alone(model, prompt, params, len(output))
            assert output == wanted
            assert torch.equal(rows, wanted_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_random_schedules_of_every_kind_of_model(kind: str) -> None:
    model = tiny_model(kind)
    done, _ = run_traffic(model, seed=len(kind), num_requests=30, min_prefix_tokens=4)
    for prompt, params, output, rows in done:
        if output:
            wanted, wanted_rows = alone(model, prompt, params, len(output))
            assert output == wanted
            torch.testing.assert_close(rows, wanted_rows, rtol=1e-4, atol=1e-4)


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
