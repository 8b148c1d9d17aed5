"""Processes that train together do what one does: the same samples, losses, norms and parameters."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qnext.checkpoint import parts
from qnext.checkpoint.header import read_header
from qnext.checkpoint.snapshot import newest_snapshot, part_file
from qnext.errors import CorruptCheckpoint, LostRank, UsageError
from qnext.parallel.train.context import check_context
from qnext.parallel.train.experts import check_experts
from qnext.parallel.train.ranks import Division
from qnext.parallel.train.traffic import StepTraffic, TrainShape
from qnext.training import Hooks, PackedStream, StepMetrics, TrainConfig, Trainer, parameter_rules
from qnext.training.ranks import ALONE, TrainingRanks, whole_weights
from qnext.training.snapshot_writer import SnapshotFailed
from tests.training.models import documents, tiny_config, tiny_model
from tests.training.ranked import TrainingProcesses, processes, started
from tests.training.test_loop import CONFIG

CONFIG = CONFIG.with_(accumulation=4, total_steps=20, tokens_per_batch=24, lr=5e-3, health_every=5)
WIDE = {"hidden_size": 32, "vocab_size": 64, "head_dim": 32, "linear_value_head_dim": 32}
CLOCK = ("elapsed", "tokens_per_second")


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


def make_trainer(
    ranks: TrainingRanks,
    config: TrainConfig,
    dtype: torch.dtype,
    changes: dict[str, Any],
    folder: Path | None,
    hooks: Hooks,
) -> Trainer:
    model = tiny_model(dtype=dtype, **changes)
    ranks.shard(model)
    stream = PackedStream(
        documents([30, 9, 2, 17, 60, 23]),
        tokens_per_batch=config.tokens_per_batch,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )
    return Trainer(model, stream, config, folder=folder, hooks=hooks, ranks=ranks)


def trained(
    ranks: TrainingRanks, config: TrainConfig, dtype: torch.dtype, changes: dict[str, Any], steps: int
) -> tuple[list[StepMetrics], dict[str, Tensor]]:
    """The metrics of every step, and the parameters after them."""
    seen: list[StepMetrics] = []
    trainer = make_trainer(ranks, config, dtype, changes, None, Hooks(on_step=seen.append))
    trainer.run(until_step=steps)
    return seen, whole_weights(trainer.part_of, ranks)


def begun(ranks: TrainingRanks) -> dict[str, Tensor]:
    """The parameters of a new model."""
    model = ranks.new_model(tiny_config(), seed=3)
    return whole_weights({name: ranks.part(each) for name, each in model.named_parameters()}, ranks)


def continued(ranks: TrainingRanks, config: TrainConfig, folder: Path, steps: int) -> list[StepMetrics]:
    """The metrics of the steps from the newest snapshot on, where there is one, to the next."""
    seen: list[StepMetrics] = []
    trainer = make_trainer(ranks, config, torch.float64, {}, folder, Hooks(on_step=seen.append))
    trainer.resume()
    trainer.run(until_step=steps)
    trainer.save()
    return seen


def run_and_vanish(ranks: TrainingRanks, config: TrainConfig, folder: Path, steps: int) -> None:
    """The second process is gone after so many steps."""

    def vanish(metrics: StepMetrics) -> None:
        if metrics.step == steps and not ranks.is_first:
            os._exit(9)

    make_trainer(ranks, config, torch.float64, {}, folder, Hooks(on_step=vanish)).run()


class SentBytes(TorchDispatchMode):
    """What this process sends to others while it is open, by the names of torch's collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            self.found[name] += _sent(name, *args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, *args: Any) -> int:
    if name == "send":
        return sum(each.nbytes for each in args[0])
    if name == "allgather_":
        return sum(each.nbytes for each in args[1]) * (len(args[0][0]) - 1)
    if name == "_allgather_base_":
        return args[0].nbytes - args[1].nbytes
    if name == "_reduce_scatter_base_":
        return args[1].nbytes - args[0].nbytes
    if name == "alltoall_base_":
        group = dist.ProcessGroup.unbox(args[2])
        sizes = args[4] or [len(args[1]) // group.size()] * group.size()
        return args[1].nbytes // max(1, len(args[1])) * (len(args[1]) - sizes[group.rank()])
    assert name in ("recv_", "barrier"), name
    return 0


def sent(ranks: TrainingRanks, config: TrainConfig, changes: dict[str, Any], steps: int) -> Counter[str]:
    """In so many steps."""
    trainer = make_trainer(ranks, config, torch.float32, changes, None, Hooks())
    with SentBytes() as mode:
        trainer.run(until_step=steps)
    return mode.found


def save_parts(ranks: TrainingRanks, config: TrainConfig, folder: Path) -> tuple[int, int]:
    """The most numbers that one process gathered for a snapshot, and those of the whole model."""
    trainer = make_trainer(ranks, config, torch.float64, {}, folder, Hooks())
    trainer.run(until_step=1)
    with (
        mock.patch.object(ranks, "whole", side_effect=AssertionError("a parameter is gathered")),
        mock.patch.object(ranks, "gather_parts", side_effect=AssertionError("the group of training is asked")),
        mock.patch.object(ranks.aside, "gather_parts", wraps=ranks.aside.gather_parts) as gather,
    ):
        trainer.save()
    most = max(call.args[0].numel() for call in gather.call_args_list if call.args[0].dtype != torch.uint8)
    return most, sum(ranks.shape(part).numel() for part in trainer.part_of.values())


def save_where_one_disk_is_full(ranks: TrainingRanks, config: TrainConfig, folder: Path) -> str:
    """What the failure of the second snapshot says."""
    trainer = make_trainer(ranks, config, torch.float64, {}, folder, Hooks())
    trainer.run(until_step=1)
    trainer.save()
    trainer.run(until_step=2)
    error = None if ranks.is_first else OSError(errno.EIO, "this disk is broken")
    with mock.patch("qnext.checkpoint.parts.write_tensors", wraps=parts.write_tensors, side_effect=error):
        try:
            trainer.save()
        except SnapshotFailed as failure:
            return str(failure)
    return ""


def run_and_die_unpublished(ranks: TrainingRanks, config: TrainConfig, folder: Path, steps: int) -> None:
    """The first process is gone when all have written the snapshot of a step and before it has its name."""
    aside = ranks.aside
    gather, told = aside.gather_parts, aside.told

    def gather_and_die(values_N: Tensor) -> Tensor:
        gather(values_N)
        os._exit(9)

    def tell(text: str) -> str:
        place = told(text)
        if f"step-{steps:08}." in place and ranks.is_first:
            mock.patch.object(aside, "gather_parts", gather_and_die).start()
        return place

    trainer = make_trainer(ranks, config, torch.float64, {}, folder, Hooks())
    with mock.patch.object(aside, "told", tell):
        trainer.run()


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
    """Documents go over the cut, and end before it. What is seen of the inside is that of the rows of a process."""
    config = CONFIG.with_(accumulation=3, tokens_per_batch=48, sequence_length=40)
    for recompute in (False, True):
        train_as_one(cut, config.with_(checkpoint_activations=recompute), sees_all_rows=False)


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
    with pytest.raises(UsageError, match=r"--context-parallel 2: it must divide the 25 tokens"):
        cut.run(trained, CONFIG.with_(tokens_per_batch=25), torch.float32, {}, 1)
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
