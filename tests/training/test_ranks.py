"""Processes that train together do what one does: the same samples, losses, norms and parameters."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qnext.checkpoint.header import read_header
from qnext.checkpoint.snapshot import newest_snapshot, part_file
from qnext.errors import CorruptCheckpoint, LostRank, UsageError
from qnext.parallel.train.context import check_context
from qnext.parallel.train.experts import check_experts
from qnext.parallel.train.ranks import Division
from qnext.parallel.train.traffic import StepTraffic, TrainShape
from qnext.training import StepMetrics, TrainConfig, parameter_rules
from qnext.training.ranks import ALONE
from tests.training.models import tiny_config, tiny_model
from tests.training.rank_jobs import (
    CONFIG,
    begun,
    continued,
    run_and_die_unpublished,
    run_and_vanish,
    save_parts,
    save_where_one_disk_is_full,
    sent,
    trained,
)
from tests.training.ranked import TrainingProcesses, processes, started

WIDE = {"hidden_size": 32, "vocab_size": 64, "head_dim": 32, "linear_value_head_dim": 32}
CLOCK = ("elapsed", "tokens_per_second")


@pytest.fixture(scope="module", autouse=True)
def one_thread_as_each_rank_has() -> Iterator[None]:
    """Two threads share out a sum otherwise than one does."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def two() -> Iterator[TrainingProcesses]:
    with processes(2) as found:
        yield found


@pytest.fixture(scope="module")
def dealt(two: TrainingProcesses) -> TrainingProcesses:
    """Each has half of the experts."""
    return two.divided(Division(expert=2))


@pytest.fixture(scope="module")
def cut(two: TrainingProcesses) -> TrainingProcesses:
    """Each has half of the rows of every micro batch."""
    return two.divided(Division(context=2))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_as_one(two: TrainingProcesses, optimizer: str) -> None:
    train_as_one(two, CONFIG.with_(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_experts_on_two_processes(dealt: TrainingProcesses, optimizer: str) -> None:
    train_as_one(dealt, CONFIG.with_(optimizer=optimizer, checkpoint_activations=True))


def test_each_process_makes_its_part_of_a_new_model(two: TrainingProcesses, dealt: TrainingProcesses) -> None:
    """Bit by bit what one process makes."""
    whole = dict(tiny_model(seed=3).named_parameters())
    for ranks in (two, dealt):
        for found in ranks.run(begun):
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], each) for name, each in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_on_two_of_four_processes(optimizer: str) -> None:
    """Each expert is on two, which have cut it among them."""
    with processes(4) as ranks:
        train_as_one(ranks.divided(Division(expert=2)), CONFIG.with_(optimizer=optimizer))


def test_rows_on_two_processes(cut: TrainingProcesses) -> None:
    """Documents go over the cut, and end before it; parts of 24 rows, and of 23 and 24. What is seen of the inside is
    that of the rows of a process."""
    config = CONFIG.with_(accumulation=3, sequence_length=40)
    for recompute, size in ((False, 48), (True, 47)):
        changed = config.with_(checkpoint_activations=recompute, tokens_per_batch=size)
        train_as_one(cut, changed, sees_all_rows=False)


@pytest.mark.slow
def test_rows_and_experts_on_four_processes() -> None:
    """A document goes through three and four ranks; and two cuts of micro batches beside two of experts."""
    config = CONFIG.with_(tokens_per_batch=48, sequence_length=60, optimizer="muon")
    with processes(4) as ranks:
        for division in (Division(context=4), Division(expert=2, context=2)):
            train_as_one(ranks.divided(division), config, sees_all_rows=False)


def train_as_one(ranks: TrainingProcesses, config: TrainConfig, *, sees_all_rows: bool = True) -> None:
    """In fp64, where the order of a sum hardly shows: every number of the report, and every parameter."""
    alone, weights = trained(ALONE, config, torch.float64, {}, 6)
    for rank, (steps, found) in enumerate(ranks.run(trained, config, torch.float64, {}, 6)):
        assert len(steps) == 6
        inside = sees_all_rows and rank == 0
        for mine, theirs in zip(steps, alone, strict=True):
            assert numbers(mine, of_inside=inside) == pytest.approx(numbers(theirs, of_inside=inside), rel=1e-9)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_bit_differs_where_no_sum_is_split(two: TrainingProcesses, optimizer: str) -> None:
    """Two micro batches, whose sum has one order; parameters that are used once; no clipping, whose norm adds up by
    parts; and halves of parameters that fill vectors, beside which AdamW rounds otherwise."""
    changes = {"tie_word_embeddings": False, "num_nextn_predict_layers": 0, **WIDE}
    config = CONFIG.with_(optimizer=optimizer, accumulation=2, clip_norm=1e9, health_every=0)
    alone, weights = trained(ALONE, config, torch.float32, changes, 20)
    for steps, found in two.run(trained, config, torch.float32, changes, 20):
        assert [each.loss for each in steps] == [each.loss for each in alone]
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_twenty_steps_in_fp32(two: TrainingProcesses, optimizer: str) -> None:
    """Through the native kernels, where there are any. Sums of four micro batches have another order."""
    config = CONFIG.with_(optimizer=optimizer, lr=1e-3, health_every=0, checkpoint_activations=True)
    alone, _ = trained(ALONE, config, torch.float32, {}, 20)
    for steps, _ in two.run(trained, config, torch.float32, {}, 20):
        for mine, theirs in zip(steps, alone, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
            assert mine.experts == theirs.experts


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_other_processes(
    two: TrainingProcesses, dealt: TrainingProcesses, tmp_path: Path, optimizer: str
) -> None:
    """Two that have dealt out the experts, one, two: as one alone without a break, from the same samples."""
    config = CONFIG.with_(optimizer=optimizer)
    straight, _ = trained(ALONE, config, torch.float64, {}, 6)
    steps = dealt.run(continued, config, tmp_path, 2)[0]
    steps += continued(ALONE, config, tmp_path, 4)
    steps += two.run(continued, config, tmp_path, 6)[0]
    for mine, theirs in zip(steps, straight, strict=True):
        assert numbers(mine, of_inside=True) == pytest.approx(numbers(theirs, of_inside=True), rel=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_from_two_to_four_to_one(tmp_path: Path) -> None:
    straight, _ = trained(ALONE, CONFIG, torch.float64, {}, 6)
    steps = []
    for num_ranks, until in ((2, 1), (4, 3)):
        with processes(num_ranks) as ranks:
            steps += ranks.run(continued, CONFIG, tmp_path, until)[0]
            if num_ranks == 4:  # each expert is on two, which have cut it
                steps += ranks.divided(Division(expert=2)).run(continued, CONFIG, tmp_path, until + 1)[0]
    steps += continued(ALONE, CONFIG, tmp_path, 6)
    for mine, theirs in zip(steps, straight, strict=True):
        assert numbers(mine, of_inside=True) == pytest.approx(numbers(theirs, of_inside=True), rel=1e-9)


@pytest.mark.parametrize("way", ["muon", "recomputed experts", "recomputed rows"])
def test_a_step_sends_what_is_planned(two: TrainingProcesses, way: str) -> None:
    send_as_planned(two, 2, way)


@pytest.mark.slow
def test_other_steps_send_what_is_planned(two: TrainingProcesses) -> None:
    for way in ("plain", "experts", "rows"):
        send_as_planned(two, 2, way)
    with processes(4) as four:
        for way in ("plain", "experts", "recomputed experts", "experts and rows"):
            send_as_planned(four, 4, way)


def send_as_planned(ranks: TrainingProcesses, num_ranks: int, way: str) -> None:
    """To the byte. Every token goes to all experts, so half of them are elsewhere."""
    changes = {"num_experts_per_tok": 6}
    recomputes, muon = "recomputed" in way, way == "muon"
    division = Division(expert=2 if "experts" in way else 1, context=2 if "rows" in way else 1)
    config = CONFIG.with_(health_every=0, checkpoint_activations=recomputes, optimizer="muon" if muon else "adamw")
    divided = ranks.divided(division)
    few, many = (sum(divided.run(sent, config, changes, steps), Counter()) for steps in (1, 2))
    rules = parameter_rules(tiny_model(**changes), optimizer=config.optimizer)
    shape = TrainShape(
        num_ranks,
        config.tokens_per_batch,
        config.accumulation,
        *division,
        recomputes=recomputes,
        matrices=[rule.name for rule in rules if rule.algorithm == "muon" and rule.parameter.dim() == 2],
    )
    planned = StepTraffic.of(tiny_config(**changes), shape)
    step = many - few
    assert step.pop("_allgather_base_") == planned.parameters
    assert step.pop("_reduce_scatter_base_") == planned.gradients
    if division.context == 1:
        assert step.pop("alltoall_base_", 0) == planned.experts
    rest = planned.rows + planned.numbers + planned.updates + (planned.experts if division.context > 1 else 0)
    assert sum(step.values()) == rest


def test_a_lost_process_ends_the_run(tmp_path: Path) -> None:
    """The others say which one it was, and the last snapshot is whole."""
    config = CONFIG.with_(snapshot_every=1)
    with started(2, patience=5.0) as ranks:
        ranks.send(run_and_vanish, config, tmp_path, 3)  # the snapshot of step 1 is on the disk by then
        failure = ranks.workers.connections[0].recv()
    assert isinstance(failure, LostRank), failure
    assert str(failure).startswith("rank 1 was lost")
    found = newest_snapshot(tmp_path / "snapshots")
    assert found is not None
    assert found[1].step in (1, 2)
    assert len(continued(ALONE, config, tmp_path, found[1].step + 1)) == 1


def test_no_process_has_the_whole_model_when_it_saves(two: TrainingProcesses, tmp_path: Path) -> None:
    """Nothing but sizes and a path goes from one to the other. The files hold every number once."""
    (most, num_parameters), (most_of_other, _) = two.run(save_parts, CONFIG, tmp_path)
    assert max(most, most_of_other) <= 3
    found = newest_snapshot(tmp_path / "snapshots")
    assert found is not None
    sizes = [
        sum(math.prod(info.shape) for info in read_header(file, any_name=True).values()) for file in found[1].parts
    ]
    assert len(sizes) == 2
    assert sum(sizes) == 3 * num_parameters  # and two moments
    assert max(sizes) < 0.7 * sum(sizes)


def test_a_part_that_cannot_be_written_costs_one_snapshot(two: TrainingProcesses, tmp_path: Path) -> None:
    for told in two.run(save_where_one_disk_is_full, CONFIG, tmp_path):
        assert "this disk is broken" in told
        assert told.endswith("the newest is step-00000001")
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000001"]
    damaged = tmp_path / "snapshots" / "step-00000001" / part_file(1)
    damaged.unlink()
    with pytest.raises(CorruptCheckpoint, match=r"rank-00001.safetensors: missing"):
        newest_snapshot(tmp_path / "snapshots")


def test_a_kill_before_a_snapshot_has_its_name_leaves_the_last_one(tmp_path: Path) -> None:
    config = CONFIG.with_(snapshot_every=1)
    with started(2, patience=5.0) as ranks:
        ranks.send(run_and_die_unpublished, config, tmp_path, 2)
        failure = ranks.workers.connections[1].recv()
    assert isinstance(failure, LostRank), failure
    written = [file.name for file in (tmp_path / "snapshots").glob(".step-00000002.partial-*/*")]
    assert sorted(written) == [part_file(0), part_file(1)]
    found = newest_snapshot(tmp_path / "snapshots")
    assert found is not None
    assert found[1].step == 1
    straight, _ = trained(ALONE, config, torch.float64, {}, 2)
    (step,) = continued(ALONE, config, tmp_path, 2)
    assert numbers(step, of_inside=True) == pytest.approx(numbers(straight[1], of_inside=True), rel=1e-9)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["step-00000001", "step-00000002"]


def test_micro_batches_that_cannot_be_divided_are_refused(two: TrainingProcesses) -> None:
    for config, name in ((CONFIG.with_(accumulation=3), "accumulation=3"), (CONFIG.with_(parallel_batches=2), "para")):
        with pytest.raises(UsageError, match=name):
            two.run(trained, config, torch.float32, {}, 1)


def test_rows_that_cannot_be_cut_are_refused(cut: TrainingProcesses) -> None:
    with pytest.raises(UsageError, match=r"--context-parallel 2: a micro batch has 1 rows"):
        cut.run(trained, CONFIG.with_(tokens_per_batch=1), torch.float32, {}, 1)
    with pytest.raises(UsageError, match="mtp_steps=2"):
        cut.run(trained, CONFIG.with_(mtp_steps=2), torch.float32, {}, 1)
    with pytest.raises(UsageError, match=r"--context-parallel 2: it must divide the 3 ranks"):
        check_context(2, num_ranks=3)


def test_experts_that_cannot_be_dealt_are_refused() -> None:
    for num_parts, num_ranks in ((4, 4), (2, 3), (7, 7)):
        with pytest.raises(UsageError, match=f"--expert-parallel {num_parts}: it must divide"):
            check_experts(tiny_config(), num_parts, num_ranks=num_ranks)
    with pytest.raises(UsageError, match="has no experts"):
        check_experts(tiny_config(num_experts=0, intermediate_size=8), 2, num_ranks=2)


def numbers(metrics: StepMetrics, *, of_inside: bool) -> list[float]:
    """All of them but times. The first process alone looks at the inside of the first micro batch."""
    values = dataclasses.asdict(metrics)
    if not of_inside:
        values["health"] = None
    found: list[float] = []
    waiting = [value for name, value in values.items() if name not in CLOCK]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (int, float)):
            found.append(float(value))
    return found
