"""What a SpeedMeter times is what it says: the same tokens, positions and caches as the engine's."""

from __future__ import annotations

import pytest
import torch

from qnext.bench.speed import SpeedMeter, random_tokens
from qnext.engine import Engine, SamplingParams
from qnext.engine.policy.step import StepPlan
from qnext.model import CausalLM, initialize
from tests.text_folders import tiny_config

CONFIG = tiny_config(61)
STEPS = 5


@pytest.fixture(scope="module")
def model() -> CausalLM:
    model = CausalLM(CONFIG)
    initialize(model, seed=3)
    return model


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Every step that any executor is asked for."""

    from qnext.engine.execution.local import LocalExecutor

    seen: list[StepPlan] = []
    execute = LocalExecutor.execute

    def watched(self: LocalExecutor, plan: StepPlan) -> object:
        seen.append(plan)
        return execute(self, plan)

    monkeypatch.setattr(LocalExecutor, "execute", watched)
    return seen


def positions(plans: list[StepPlan]) -> list[tuple[int, int]]:
    """(first position, tokens) of the one sequence of each step."""
    return [(plan.sequences[0].start, len(plan.sequences[0].token_ids)) for plan in plans]


@pytest.mark.parametrize("depth", [0, 1, 40])
def test_decoding_is_the_engine_s(model: CausalLM, plans: list[StepPlan], depth: int) -> None:
    meter = SpeedMeter(model, decode_tokens=STEPS)
    assert meter.decode_seconds(depth) > 0
    num_prompt = max(depth, 1)
    assert positions(plans) == [(0, num_prompt), *((num_prompt + i, 1) for i in range(STEPS))]
    fed = [plan.sequences[0].token_ids[0] for plan in plans[1:]]
    prompt = random_tokens(num_prompt, vocab_size=CONFIG.vocab_size)
    (answer,) = Engine.of(model).generate([prompt], SamplingParams(max_tokens=STEPS, ignore_eos=True))
    assert fed == list(answer.output_ids)


def test_every_round_decodes_at_the_same_depth(model: CausalLM, plans: list[StepPlan]) -> None:
    meter = SpeedMeter(model, decode_tokens=STEPS)
    for _ in range(3):
        for depth in (0, 40):
            meter.decode_seconds(depth)
    steps = positions(plans)
    assert steps.count((0, 40)) == 1  # a prompt is read once
    assert [place for place in steps if place[1] == 1 and place[0] >= 40] == [(40 + i, 1) for i in range(STEPS)] * 3
    assert meter.reading_seconds(40) > 0
    assert steps == positions(plans)


def test_prefill_and_generate(model: CausalLM, plans: list[StepPlan]) -> None:
    meter = SpeedMeter(model, decode_tokens=STEPS)
    assert meter.prefill_seconds(70) > 0 and meter.prefill_seconds(70) > 0
    assert positions(plans) == [(0, 70)] * 2
    plans.clear()
    assert meter.generate_seconds() > 0
    assert positions(plans) == [(0, 1), *((1 + i, 1) for i in range(STEPS))]


def test_caches_are_counted(model: CausalLM) -> None:
    meter = SpeedMeter(model, decode_tokens=STEPS)
    meter.prefill_seconds(16)
    small = meter.cache_bytes
    assert small > meter.state_bytes > 0 and meter.kv_bytes_per_token > 0
    meter.decode_seconds(160)
    assert meter.cache_bytes >= small + 160 * meter.kv_bytes_per_token


def test_prompts_are_fixed() -> None:
    assert random_tokens(9, vocab_size=50) == random_tokens(9, vocab_size=50)
    assert max(random_tokens(2000, vocab_size=50)) == 49
    assert torch.tensor(random_tokens(2000, vocab_size=50)).unique().numel() == 50
