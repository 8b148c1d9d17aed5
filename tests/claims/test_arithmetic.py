"""Whole models out of layers, equal operations out of budgets, and problems that teach only their answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qnext.claims.layers.drafted import DraftedSteps
from qnext.claims.layers.shapes import KINDS, RELEASED, tiny
from qnext.claims.layers.speed import LayerSpeed
from qnext.claims.layers.times import fitted_line, step_seconds
from qnext.claims.notebook import Measured
from qnext.claims.training.ablations import model_folder
from qnext.claims.training.arms import EXPERTS, FULL, HYBRID, LINEAR, MICRO_BALANCE, RunBudget, small_model
from qnext.claims.training.runs import recall_documents
from qnext.config import LINEAR_ATTENTION
from qnext.eval.ids import IdShape
from qnext.planning import count_parameters
from qnext.planning.flops import FORWARD_PASSES, token_flops


def test_a_line_is_found_and_summed_over_a_prompt() -> None:
    base, slope = 3e-6, 2e-11
    line = fitted_line([(context, base + slope * context) for context in (256, 4096, 131072)])
    assert (line.base, line.slope) == pytest.approx((base, slope))
    assert line.error == pytest.approx(0, abs=1e-9)
    assert line.prompt(1000) == pytest.approx(sum(base + slope * (token + 0.5) for token in range(1000)))


def test_a_line_says_how_far_a_point_lies_from_it() -> None:
    assert fitted_line([(0, 1.0), (10, 2.0), (20, 3.6)]).error > 0.02


def test_a_step_of_a_model_is_the_sum_of_its_layers_and_its_head() -> None:
    layers = {
        "linear": 3.0,
        "full": 5.0,
        "dense": 11.0,
        "frame": 1.0,
        "dense frame": 2.0,
        "head": 1.5,
        "dense head": 2.5,
    }
    rows = RELEASED.hybrid.vocab_size / RELEASED.head_rows
    hybrid, dense = step_seconds(layers, RELEASED)
    assert hybrid == pytest.approx(36 * 2 + 12 * 4 + rows * 0.5 + 1)
    assert dense == pytest.approx(64 * 9 + rows * 0.5 + 2)


def test_drafts_pay_where_right_ones_outweigh_their_cost() -> None:
    """A step of one row takes 36 x 2 + 12 x 4 + 1 seconds, a draft 4, a row more 0.5 in every layer; heads are free."""
    run = LayerSpeed(RELEASED, "int4-g32", 2, chunks=(), long_chunk=0, lengths=(1, 2, 3), batches=(1, 2))
    steps = DraftedSteps(run, context=64, most_drafts=1)
    one = {"linear": 3.0, "full": 5.0, "frame": 1.0, "head": 1.0}
    two = {**one, "linear": 3.5, "full": 5.5}
    known = {run.drafted_name(64, rows): Measured([layers, layers], {}, "") for rows, layers in ((1, one), (2, two))}
    assert steps.grids({}, {"code": 0.5}) == ({}, [])
    cost = (121 + 48 * 0.5 + 4) / 121
    values, (costs, speeds) = steps.grids(known, {"code": 0.5, "never": 0.0})
    assert values["released_code"].value == pytest.approx(1.5 / cost)
    assert values["released_never"].value == pytest.approx(1 / cost)
    assert [row[-1] for row in costs.rows] == [f"{cost - 1:.0%}"]
    assert [row[0] for row in speeds.rows] == ["code", "never"]


def test_a_model_of_another_recipe_has_another_folder() -> None:
    budgets = (RunBudget(small_model(64), 1e12), RunBudget(small_model(64), 2e12))
    facts = [budget.facts(HYBRID, seed=0) for budget in (*budgets, budgets[0])]
    first, second, again = (model_folder(Path("runs"), "text/full, no gate/0", each) for each in facts)
    assert first == again != second
    assert first.parent == Path("runs/models") and first.name.startswith("text-full-no-gate-0-")


def test_timed_layers_are_those_of_the_released_models() -> None:
    whole = count_parameters(RELEASED.hybrid)
    linear, dense = (count_parameters(RELEASED.shape(kind)) for kind in ("linear", "dense"))
    assert linear.delta_net * 36 == whole.delta_net
    assert linear.experts * 48 == whole.experts
    assert dense.dense_mlp * 64 == count_parameters(RELEASED.dense).dense_mlp
    for kind in KINDS:
        shape = tiny().shape(kind)
        assert (shape.layer_types == (LINEAR_ATTENTION,)) == (kind == "linear")


def test_arms_get_the_same_operations() -> None:
    budget = RunBudget(small_model(64), 1e12)
    for arm in (HYBRID, FULL, LINEAR, MICRO_BALANCE, *EXPERTS.values()):
        config = arm.config(budget.base)
        each = FORWARD_PASSES * token_flops(config, context=(budget.sequence_length + 1) / 2).total
        spent = each * budget.steps(arm) * budget.tokens_per_step
        assert spent == pytest.approx(budget.flops, rel=0.005)
        assert budget.tokens_per_step % arm.micro_batches == 0


def test_problems_teach_their_answers_alone() -> None:
    shapes = [IdShape(128, 20, num_facts=2, num_queries=2), IdShape(128, 24, num_facts=3, num_queries=1)]
    documents = recall_documents("mqar", shapes, 10, seed=0)
    assert [len(document) for document in documents[:4]] == [20, 24, 20, 24]
    assert [int((document >= 0).sum()) for document in documents[:4]] == [2, 1, 2, 1]
    assert all(np.where(document < 0, ~document, document).max() < 128 for document in documents)
