"""What tests send to processes that train together: jobs, each of which runs on all of them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qnext.checkpoint import parts
from qnext.training import Hooks, PackedStream, StepMetrics, TrainConfig, Trainer
from qnext.training.ranks import TrainingRanks
from qnext.training.snapshot_writer import SnapshotFailed
from tests.training.models import documents, tiny_config, tiny_model
from tests.training.test_loop import CONFIG

CONFIG = CONFIG.with_(accumulation=4, total_steps=20, tokens_per_batch=24, lr=5e-3, health_every=5)


def whole_weights(part_of: Mapping[str, Tensor], ranks: TrainingRanks) -> dict[str, Tensor]:
    """The parameters whose parts these are, of all processes together."""
    return {name: ranks.whole([part], [part])[0] for name, part in part_of.items()}


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
