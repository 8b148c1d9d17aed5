"""Recorded decoding steps give the very bits of those that run in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.execution.executor import StepOutput
from qnext.engine.policy.step import StepPlan
from qnext.model import CausalLM
from qnext.ops import backends
from tests.engine.executors import KeepingExecutor
from tests.model.models import make_in_form

pytestmark = pytest.mark.skipif(backends.cpu_kernels() is None, reason="the native kernels are not built or not wanted")

NAMES = ["next, sizes of the native kernels", "qwen3_moe, sizes of the native kernels"]
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)


class RecordedSteps(KeepingExecutor):
    """Counts the steps that were recorded ones."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.num_recorded = 0

    def execute(self, plan: StepPlan) -> StepOutput:
        num_tokens = sum(len(s.token_ids) for s in plan.sequences)
        self.num_recorded += plan.only_decodes and self._decoding.serves(num_tokens)
        return super().execute(plan)


def generate(model: CausalLM, lengths: list[int], *, may_record: bool) -> tuple[list[Tensor], RecordedSteps]:
    config = EngineConfig(max_num_seqs=3, max_model_len=256, poison=True, record_steps=may_record)
    engine = Engine.of(model, config)
    executor = RecordedSteps(engine)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    completions = engine.generate(prompts, GREEDY)
    return [torch.stack(executor.rows[c.request_id]) for c in completions], executor


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name: str, form: str) -> None:
    """Five requests through three places: 1, 2 and 3 sequences, slots and pages change owners, pages fill up."""
    model = make_in_form(name, form)
    lengths = [5, 17, 64, 1, 30]
    recorded, executor = generate(model, lengths, may_record=True)
    plain, other = generate(model, lengths, may_record=False)
    assert executor.num_recorded > 40 and other.num_recorded == 0
    assert set(executor._decoding._batches) >= {(2, 2, 1, frozenset()), (3, 3, 1, frozenset())}
    for ours, theirs in zip(recorded, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_recordings_that_were_used_longest_ago_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnext.engine.execution.recorded._MAX_RECORDINGS", 2)
    model = make_in_form(NAMES[0], "float32")
    rows, executor = generate(model, [5, 17, 64, 1, 30], may_record=True)
    assert len(executor._decoding._batches) == 2
    plain, _ = generate(model, [5, 17, 64, 1, 30], may_record=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, plain, strict=True))


def test_a_size_that_cannot_be_recorded_runs_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some attempts nobody tries it again; other sizes are recorded all the same."""
    attempts: list[int] = []

    def record(compute: Any, device: torch.device) -> tuple[Any, ops.Recording | None]:
        result, recording = ops.record(compute, device)
        attempts.append(len(result[0]))
        return result, None if len(result[0]) == 3 else recording

    model = make_in_form(NAMES[0], "float32")
    plain, _ = generate(model, [5, 17, 64], may_record=False)
    monkeypatch.setattr("qnext.engine.execution.recorded.record", record)
    rows, executor = generate(model, [5, 17, 64], may_record=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, plain, strict=True))
    assert attempts.count(3) == 4 and not executor._decoding.serves(3)
    assert executor._decoding.serves(2)


def test_a_model_with_hooks_runs_in_python() -> None:
    model = make_in_form(NAMES[0], "float32")
    seen = []
    plain, _ = generate(model, [9], may_record=True)
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    hooked, _ = generate(model, [9], may_record=True)
    assert len(seen) == GREEDY.max_tokens
    hook.remove()
    assert torch.equal(plain[0], hooked[0])


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_changed_weights_are_seen(form: str) -> None:
    """An engine outlives an update of its model's weights, of those that calls read as copies too."""
    model = make_in_form(NAMES[0], form)
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64))
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0, logprobs=0)

    def logprobs() -> list[float | None]:
        return [token.logprob for token in engine.generate([[1, 2, 3]], params)[0].sampled]

    before = logprobs()
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
        model.lm_head.weight.mul_(1.5)
    after = logprobs()
    assert before != after
    fresh = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64))
    assert after == [token.logprob for token in fresh.generate([[1, 2, 3]], params)[0].sampled]
