"""Spikes that are skipped, the end of a run that gets no better, and the weights of its best evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qnext.errors import UsageError
from qnext.training import Hooks, StepMetrics
from qnext.training.spikes import SpikeGuard
from tests.training.models import tiny_model
from tests.training.test_loop import CONFIG, make_trainer
from tests.training.test_resume import metrics


def guard_after(steps: int, threshold: float = 6.0) -> SpikeGuard:
    guard = SpikeGuard(threshold)
    for step in range(steps):
        assert guard.judge({"main": 2.0 + 0.1 * (step % 5)}, grad_norm=1.0 + 0.2 * (step % 3)) is None
    return guard


def test_a_spike_is_what_lies_far_above_the_median() -> None:
    assert guard_after(31).judge({"main": 99.0}, grad_norm=99.0) is None, "too few steps to judge by"
    guard = guard_after(250)
    assert guard.judge({"main": 3.0}, grad_norm=1.0) is None
    assert guard.judge({"main": 3.2}, grad_norm=1.0) == "loss", "2.2 and 6 times 0.1 * 1.4826"
    assert guard.judge({"main": 0.1}, grad_norm=1e-3) is None, "better is no spike"
    assert guard.judge({"main": 2.0}, grad_norm=4.0) is None
    assert guard.judge({"main": 2.0}, grad_norm=5.0) == "gradient norm", (
        "ln 1.2 and 6 times (ln 1.4 - ln 1.2) * 1.4826: 4.7"
    )
    assert guard.num_spikes == 2
    assert guard_after(250, threshold=0.0).judge({"main": 1e9}, grad_norm=1e9) is None


def test_three_spikes_in_a_row_are_a_new_level() -> None:
    guard = guard_after(100)
    found = [guard.judge({"main": 9.0}, grad_norm=1.0) for _ in range(40)]
    assert found == ["loss"] * 3 + [None] * 37
    assert guard.judge({"main": 90.0}, grad_norm=1.0) == "loss", "the window has filled again"


def test_a_loss_that_joins_the_others_is_no_spike() -> None:
    guard = guard_after(100)
    assert guard.judge({"main": 2.0, "mtp": 8.0}, grad_norm=50.0) is None
    for _ in range(40):
        assert guard.judge({"main": 2.0, "mtp": 8.0}, grad_norm=50.0) is None
    assert guard.judge({"main": 2.0, "mtp": 8.0}, grad_norm=500.0) == "gradient norm"


CALM = CONFIG.with_(
    total_steps=44, accumulation=1, tokens_per_batch=20, spike_skip=8.0, expert_stats_every=0, mtp_coefficient=0.0
)


def test_a_spike_changes_no_weight_and_a_resumed_run_knows_the_same_spikes(tmp_path: Path) -> None:
    def spiky(model: torch.nn.Module, folder: str, trainer_hooks: Hooks | None = None) -> object:
        trainer = make_trainer(CALM, model=model, folder=tmp_path / folder, hooks=trainer_hooks)  # type: ignore[arg-type]
        factor = {36: 1e4, 41: 1e4}
        model.model.norm.weight.register_hook(lambda grad: grad * factor.get(trainer.step, 1.0))  # type: ignore[union-attr]
        return trainer

    weights: list[torch.Tensor] = []
    model = tiny_model()

    def keep(step: StepMetrics) -> None:
        weights.append(model.model.norm.weight.detach().clone())

    straight = spiky(model, "straight", Hooks(on_step=keep))
    straight.run()  # type: ignore[attr-defined]
    lines = metrics(tmp_path / "straight")
    assert [(line["step"], line["skipped_for"]) for line in lines if line["was_skipped"]] == [
        (37, "gradient norm"),
        (42, "gradient norm"),
    ]
    assert torch.equal(weights[36], weights[35]) and not torch.equal(weights[35], weights[34])

    first = spiky(tiny_model(), "cut")
    first.run(until_step=39)  # type: ignore[attr-defined]
    first.save()  # type: ignore[attr-defined]
    resumed = tiny_model(seed=7)
    second = spiky(resumed, "cut")
    second.resume()  # type: ignore[attr-defined]
    second.run()  # type: ignore[attr-defined]
    assert metrics(tmp_path / "cut") == lines
    assert second.spikes.state == straight.spikes.state  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Examined:
    cost: float


def examined(costs: Iterator[float]) -> Hooks:
    return Hooks(evaluate=lambda: Examined(next(costs)))


COSTS = [4.0, 2.0, 3.0, 2.0, 1.0, 1.5, 1.0, float("nan"), 0.0]
PATIENT = CONFIG.with_(total_steps=99, accumulation=1, eval_every=1, early_stop=3, expert_stats_every=0)


def test_a_run_that_gets_no_better_ends_with_its_best_weights(tmp_path: Path) -> None:
    straight = make_trainer(PATIENT, hooks=examined(iter(COSTS)))
    straight.run(until_step=5)
    best = [p.detach().clone() for p in straight.model.parameters()]
    straight.run()
    assert straight.step == 8 and straight.is_done and (straight.best.step, straight.best.cost) == (5, 1.0)
    assert not all(map(torch.equal, straight.model.parameters(), best))
    assert straight.best.put_back() and all(map(torch.equal, straight.model.parameters(), best))

    first = make_trainer(PATIENT, folder=tmp_path, hooks=examined(iter(COSTS)))
    first.run(until_step=6)
    first.save()
    second = make_trainer(PATIENT, model=tiny_model(seed=3), folder=tmp_path, hooks=examined(iter(COSTS[5:])))
    second.resume()
    second.evaluate()  # as the commands do at the start: the step was judged before
    second.run()
    assert second.step == 8 and second.best.put_back()
    assert all(map(torch.equal, second.model.parameters(), best))


def test_an_end_by_evaluations_that_there_are_not_is_refused() -> None:
    with pytest.raises(UsageError, match="early_stop needs evaluations: set eval_every"):
        PATIENT.with_(eval_every=0)
    with pytest.raises(UsageError, match="nothing is held out"):
        make_trainer(PATIENT)
    with pytest.raises(UsageError, match="cannot be compared"):
        make_trainer(PATIENT, hooks=Hooks(evaluate=lambda: CALM)).run()
