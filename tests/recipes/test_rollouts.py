"""Rollouts by an engine on the model in training: what is learnt from is exactly what was drawn."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.model import CausalLM
from qnext.recipes.rollouts import Answer, Problem, RolloutConfig, RolloutSource
from qnext.training import StepMetrics, TrainConfig, Trainer
from qnext.training.loop import Hooks
from qnext.training.policy import PolicyGradient
from tests.engine.models import needs_native, random_prompt, tiny_model
from tests.training.test_resume import metrics

CONFIG = TrainConfig(
    lr=1e-2,
    tokens_per_batch=4096,
    sequence_length=256,
    total_steps=4,
    accumulation=2,
    weight_decay=0.0,
    balance_coefficient=0.0,
    precision="float32",
)


def model() -> CausalLM:
    return copy.deepcopy(tiny_model("hybrid"))


def reward(problem: Problem, answer: Answer) -> float:
    """More for more even tokens: most groups have a spread."""
    return sum(token % 2 == 0 for token in answer.token_ids) / (1 + len(answer.token_ids))


def source(model: CausalLM, *, length: int = 100, minibatches: int = 2, **options: object) -> RolloutSource:
    problems = [Problem(tuple(random_prompt(length + n, seed=n)), "") for n in range(3)]
    config = RolloutConfig(prompts=2, group_size=4, minibatches=minibatches, max_tokens=12)
    return RolloutSource(model, problems, reward, config, end_ids=frozenset([3]), accumulation=2, seed=5, **options)  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("length", [100, 20])
def test_training_and_rollouts_agree_exactly(replays: bool, length: int) -> None:
    """Of the answers of a group all but one found the prompt in the cache. It holds again after each update."""
    trained, seen = model(), []
    objective = PolicyGradient(replays=replays, max_mismatch=0.0)
    hooks = Hooks(on_step=seen.append)
    Trainer(trained, source(trained, length=length), CONFIG, objective=objective, hooks=hooks).run()
    first = [step.other_losses for step in seen if "mismatch" in step.other_losses]
    assert len(first) == 2 and all(step.grad_norm > 0.0 for step in seen if "mismatch" in step.other_losses)
    for found in first:
        assert found["mismatch"] == found["mismatch_max"] == found["mismatch_kl"] == found["routing_differs"] == 0.0
        assert found["entropy"] > 0.0 and found["clipped"] == 0.0
    second = [step.other_losses for step in seen if "mismatch" not in step.other_losses]
    assert any(found["clipped"] > 0.0 for found in second), "the second batch of a draw is off policy"


@needs_native
def test_prefixes_of_an_older_model_are_not_found() -> None:
    trained = model()
    rollouts = source(trained, minibatches=1)
    for _ in range(2):
        _ = [rollouts.next_batch() for _ in range(2)]
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.01)
    batch = rollouts.next_batch()  # of the third model, about prompts that the first one has seen
    losses: list[StepMetrics] = []
    config = CONFIG.with_(total_steps=1)
    remaining = iter([batch, rollouts.next_batch()])
    rollouts.next_batch = lambda: next(remaining)  # type: ignore[method-assign]
    Trainer(trained, rollouts, config, objective=PolicyGradient(), hooks=Hooks(on_step=losses.append)).run()
    assert losses[0].other_losses["mismatch_max"] == 0.0


def test_a_resumed_run_is_the_same_at_every_step(tmp_path: Path) -> None:
    """The rest of a draw that is not learnt yet is a part of the snapshot."""

    def trainer(folder: Path) -> Trainer:
        trained = model()
        return Trainer(trained, source(trained), CONFIG, objective=PolicyGradient(), folder=folder)

    straight = trainer(tmp_path / "straight")
    straight.run()
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        first = trainer(folder)
        first.run(until_step=stop)
        first.save()
        first.run()
        second = trainer(folder)
        assert second.resume() is not None and second.step == stop
        second.run()
        for (name, one), other in zip(straight.model.named_parameters(), second.model.parameters(), strict=True):
            assert torch.equal(one, other), name
        assert metrics(tmp_path / "straight") == metrics(folder)


def test_a_position_is_json_and_belongs_to_its_problems() -> None:
    trained = model()
    one, other = source(trained), source(trained)
    one.next_batch()
    other.seek(json.loads(json.dumps(one.position)))
    for _ in range(5):
        ours, theirs = one.next_batch(), other.next_batch()
        assert torch.equal(ours.rows.labels_T, theirs.rows.labels_T)
        assert torch.equal(ours.log_probs_R, theirs.log_probs_R)
        assert torch.equal(ours.advantages_N, theirs.advantages_N) and ours.facts == theirs.facts
        assert all(torch.equal(ours.routing[layer], theirs.routing[layer]) for layer in (0, 1, 2))
    with pytest.raises(CorruptCheckpoint, match="other problems"):
        source(trained, length=30).seek(one.position)


def test_groups_without_spread_are_dropped_and_counted() -> None:
    trained = model()
    rollouts = source(trained, minibatches=1)
    rewarded: list[float] = []

    def only_the_first(problem: Problem, answer: Answer) -> float:
        rewarded.append(float(len(rewarded) == 1))
        return rewarded[-1]

    rollouts._reward = only_the_first
    batches = [rollouts.next_batch() for _ in range(2)]
    assert batches[0].facts["dropped"] == 1.0 and batches[0].facts["reward"] == 1 / 8 and not batches[1].facts
    advantages = torch.cat([batch.advantages_N for batch in batches])
    assert len(advantages) == 4 and np.isclose(sorted(advantages.tolist()), [-(3**-0.5)] * 3 + [3**0.5]).all()
    batches = [rollouts.next_batch() for _ in range(2)]  # none has a spread: a step that moves nothing
    assert batches[0].facts["dropped"] == 2.0
    assert [batch.advantages_N.tolist() for batch in batches] == [[0.0], [0.0]]


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(UsageError, match="group_size must be at least 2, not 1"):
        RolloutConfig(group_size=1)
    with pytest.raises(UsageError, match="at most the answers of a draw"):
        source(model(), minibatches=5)
