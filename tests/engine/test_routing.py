"""The experts of a request's tokens, kept beside its keys: cached, copied and preempted as those are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qnext.engine import Completion, Engine, EngineConfig, SamplingParams
from qnext.engine.storage.tiers import DiskCache
from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, RouterOutput, SparseMoE
from tests.engine.models import random_prompt, tiny_model


def experts_of(model: CausalLM, answer: Completion) -> torch.Tensor:
    """[T, L, top_k] of the whole sequence at once, without an engine."""
    ids = [*answer.prompt_ids, *answer.output_ids][:-1]
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: RouterOutput) -> None:
        found.append(output.routing.experts_TA)

    layers = [module for module in model.model.modules() if isinstance(module, SparseMoE)]
    handles = [each.gate.register_forward_hook(keep) for each in layers]
    with torch.inference_mode():
        model(Batch.from_lengths(torch.tensor(ids), [len(ids)]))
    for handle in handles:
        handle.remove()
    return torch.stack(found, 1)


def check(model: CausalLM, answers: list[Completion]) -> None:
    for answer in answers:
        assert answer.routing is not None
        assert torch.equal(torch.from_numpy(answer.routing), experts_of(model, answer))


def test_routing_comes_with_a_completion_and_with_its_cached_prefix() -> None:
    model, prompt = tiny_model("hybrid"), random_prompt(140, seed=1)
    config = EngineConfig(max_num_seqs=4, num_blocks=120, max_model_len=200, keep_routing=True, poison=True)
    engine = Engine.of(model, config)
    drawn = SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=20, ignore_eos=True)
    answers = engine.generate([prompt, prompt[:100], prompt[:30]], drawn)
    assert {answer.num_cached_tokens for answer in answers} >= {0, 99, 139}
    check(model, answers)


def test_routing_survives_preemption_and_many_requests() -> None:
    model = tiny_model("hybrid")
    config = EngineConfig(max_num_seqs=6, num_blocks=14, max_model_len=100, keep_routing=True, poison=True)
    engine = Engine.of(model, config)
    prompts = [random_prompt(30 + n, seed=n) for n in range(6)]
    answers = engine.generate(prompts, SamplingParams(temperature=1.0, seed=2, max_tokens=40, ignore_eos=True))
    assert engine.metrics.num_preemptions > 0
    check(model, answers)
    engine.check_integrity()


def test_routing_comes_back_from_disk(tmp_path: Path) -> None:
    """With the blocks of a prefix that another engine has left."""
    model, prompt = tiny_model("hybrid"), random_prompt(140, seed=1)
    disk = DiskCache(tmp_path / "cache", max_bytes=1 << 26, min_tokens=32)
    config = EngineConfig(num_blocks=60, max_model_len=200, keep_routing=True, poison=True, disk_cache=disk)
    for seed, num_cached in ((0, 0), (1, 139)):
        with Engine.of(model, config) as engine:
            answers = engine.generate([prompt], SamplingParams(temperature=1.0, seed=seed, max_tokens=9))
        assert answers[0].num_cached_tokens == num_cached
        check(model, answers)


def test_without_it_there_is_none_and_what_cannot_keep_it_is_refused() -> None:
    (answer,) = Engine.of(tiny_model("hybrid"), EngineConfig(num_blocks=9)).generate(
        [[1, 2]], SamplingParams(max_tokens=2)
    )
    assert answer.routing is None
    for kind in ("linear", "dense"):
        with pytest.raises(UsageError, match="keep_routing needs routers"):
            Engine.of(tiny_model(kind), EngineConfig(keep_routing=True))
