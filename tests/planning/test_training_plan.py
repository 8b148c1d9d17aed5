"""Training runs: states, work, memory of a rank, and money."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from qnext.config import preset
from qnext.planning import cost as costs
from qnext.planning import count_parameters, training_flops
from qnext.planning.cost import Prices, run_cost
from qnext.planning.training_plan import (
    STATES,
    TrainingWish,
    activation_numbers,
    plan_training,
    rank_memory,
)

CONFIG = preset("80b-a3b")
WISH = TrainingWish("pretrain", 15e12, 4096, 0.4)


@pytest.mark.parametrize(
    ("states", "terabytes"),
    [("adamw", 1.43), ("adamw-bf16-gradients", 1.28), ("adamw-bf16", 0.96), ("muon", 1.12), ("muon-bf16", 0.80)],
)
def test_states_of_the_trunk(states: str, terabytes: float) -> None:
    assert count_parameters(CONFIG).trunk * STATES[states].total / 1e12 == pytest.approx(terabytes, abs=0.006)


def test_hours_are_work_over_what_is_reached() -> None:
    plan = plan_training(CONFIG, WISH, peak=1e15, memory_bytes=80 << 30, num_ranks=1024)
    work = training_flops(CONFIG, sequence_length=4096).total * 15e12
    assert plan.total_flops == pytest.approx(work)
    assert plan.device_hours == pytest.approx(work / 4e14 / 3600)
    assert plan.days == pytest.approx(plan.device_hours / 1024 / 24) and plan.nodes == 128
    twice = plan_training(CONFIG, replace(WISH, recomputes=True), peak=1e15, memory_bytes=80 << 30, num_ranks=1024)
    assert twice.device_hours == pytest.approx(plan.device_hours * 4 / 3)


def test_states_are_divided_and_activations_are_not() -> None:
    few, many = (rank_memory(CONFIG, WISH, ranks) for ranks in (64, 128))
    assert few.optimizer == 2 * many.optimizer and few.activations == many.activations
    assert few.gathered == many.gathered > rank_memory(CONFIG, replace(WISH, expert_parallel=8), 64).gathered
    assert rank_memory(CONFIG, WISH, 1).gathered == 0
    assert sum(vars(few).values()) == few.total
    assert activation_numbers(CONFIG, recomputes=True) < activation_numbers(CONFIG, recomputes=False) / 10


def test_the_least_ranks_fit_and_half_of_them_do_not() -> None:
    plan = plan_training(CONFIG, WISH, peak=1e15, memory_bytes=80 << 30, num_ranks=None)
    assert plan.least_ranks is not None and plan.num_ranks == plan.least_ranks
    usable = int(0.9 * (80 << 30)) - (2 << 30)
    assert plan.memory.total <= usable < rank_memory(CONFIG, WISH, plan.least_ranks // 2).total
    hopeless = plan_training(CONFIG, WISH, peak=1e15, memory_bytes=8 << 30, num_ranks=None)
    assert hopeless.least_ranks is None


def test_an_adapter_spares_gradients_of_weights_alone() -> None:
    wish = replace(WISH, kind="lora", adapter_parameters=1_000_000, frozen_bytes=160_000_000_000)
    full = plan_training(CONFIG, WISH, peak=1e15, memory_bytes=80 << 30, num_ranks=8)
    found = plan_training(CONFIG, wish, peak=1e15, memory_bytes=80 << 30, num_ranks=8)
    assert found.flops.attention_core == full.flops.attention_core
    assert found.flops.experts == pytest.approx(full.flops.experts * 2 / 3)
    assert found.memory.optimizer == 12 * 1_000_000 // 8 and found.trained_parameters == 1_000_000
    assert found.memory.weights == (160_000_000_000 + 2_000_000) // 8


def test_costs() -> None:
    assert doctest.testmod(costs).failed == 0
    found = run_cost(Prices(per_hour=2.0, watts=1000.0), 7200)
    assert (found.money, found.kwh) == (4.0, 2.0)
    assert run_cost(Prices(watts=500.0, per_kwh=0.5), 7200).money == 0.5
    assert not Prices().are_known
