"""`qnext plan`: what fits into memory and how fast it will be, before anything is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.sampling import ExpertMemory
from qnext.cli.flags.values import AsJson, Strict, human_int, option, token_count
from qnext.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from qnext.planning.cost import Prices


@dataclass(frozen=True)
class ServingFlags:
    """What is to run, and on what."""

    context: Annotated[
        int | None, option("tokens of a sequence, as 32k; else 4,096", metavar="N", parser=human_int)
    ] = None
    batch: Annotated[int, option("sequences at once", min=1)] = 1
    memory: Annotated[int | None, option("memory that is free, else as here", metavar="SIZE", parser=human_int)] = None
    expert_memory: ExpertMemory = None
    scheme: Annotated[str | None, option("bf16, fp8, or as of `qnext quantize`, with --records")] = None
    disk_speed: Annotated[int | None, option("of the disk in a second, as 1.5g", metavar="SIZE", parser=human_int)] = (
        None
    )
    machine: Annotated[str | None, option("plan for another machine: its name or 24GiB,30GB/s,1.5GB/s")] = None
    yarn: Annotated[float | None, option("context stretched by this factor", min=1.0)] = None
    calibration: Annotated[Path | None, option("of this machine; else the one in the user's cache", metavar="FILE")] = (
        None
    )
    calibrate: Annotated[bool, option("measure this machine first, a minute or two", "--calibrate")] = False
    picture: Annotated[Path | None, option("memory by part and speed by context, as .svg or .png", metavar="FILE")] = (
        None
    )
    tensor_parallel: Annotated[int, option("ranks that cut heads, dense matrices and the vocabulary", min=1)] = 1
    expert_parallel: Annotated[int, option("ranks that divide the experts of a layer", min=1)] = 1
    acceptance: Annotated[float | None, option("of each draft, else 0.65, an assumption", min=0.0, max=1.0)] = None


@dataclass(frozen=True)
class ClusterFlags:
    """How many GPUs, and what they cost."""

    gpus: Annotated[int | None, option("GPUs of --machine, in each node", min=1)] = None
    nodes: Annotated[int, option("nodes of them", min=1)] = 1
    price_per_hour: Annotated[float | None, option("of a GPU, or of the machine, in any currency", min=0.0)] = None
    watts: Annotated[float | None, option("of a GPU, or of the machine; else what a named GPU draws", min=0.0)] = None
    price_per_kwh: Annotated[float | None, option("where energy is paid apart", min=0.0)] = None

    def prices(self, num_devices: int) -> Prices:
        """Of so many devices together."""
        from qnext.planning.cost import Prices

        hour, watts = (None if value is None else num_devices * value for value in (self.price_per_hour, self.watts))
        return Prices(hour, watts, self.price_per_kwh)


@dataclass(frozen=True)
class TrainingPlanFlags:
    """A training run instead of answers."""

    train: Annotated[str | None, option("pretrain, sft or lora: plan a training run")] = None
    tokens: Annotated[
        float | None,
        option("of all epochs, as 15T, by powers of 1,000", metavar="N", parser=token_count),
    ] = None
    sequence_length: Annotated[int, option("tokens of a sequence", metavar="N", parser=human_int)] = 4096
    mfu: Annotated[
        float,
        option("assumed share of the peak, recomputing included", min=0.01, max=1.0),
    ] = 0.4
    states: Annotated[
        str | None, option("adamw, adamw-bf16-gradients, adamw-bf16, muon, muon-bf16, or fp32 as here")
    ] = None
    recompute: Annotated[bool, option("activations are computed again in the backward pass", "--recompute")] = False
    sequences: Annotated[int, option("of a rank at once", min=1)] = 1
    lora: Annotated[str, option("all, attention or experts: what an adapter changes")] = "all"
    lora_rank: Annotated[int, option("of the adapter", min=1)] = 16


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL|PRESET...", help="folders, hub names, or presets")],
    *,
    serving: ServingFlags,
    cluster: ClusterFlags,
    training: TrainingPlanFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Say what a model consists of, whether it fits, what stays in memory of its experts, and how fast it will be.

    The disk is measured by reading some records of the folder, kernels by computing some experts, within a second or
    two. Of another machine published peaks count, and the shares of them that are reached. Several models are put side
    by side. With --train a training run is planned instead. Exit code 4 where none of the models fits.
    """
    if training.train is not None:
        _print_training(models, serving, cluster, training, as_json=as_json)
        return
    from qnext.diagnostics.heatmap import check_picture
    from qnext.diagnostics.plan import plan_document, plan_model
    from qnext.diagnostics.plan_page import format_plans
    from qnext.diagnostics.plan_picture import write_plan_picture
    from qnext.parallel.mesh import Mesh
    from qnext.planning.machines import planned_machine
    from qnext.planning.speculation import ASSUMED_ACCEPTANCE
    from qnext.session.planned import Asked, planned_model

    if serving.picture is not None:
        check_picture(serving.picture)
    if serving.calibrate:
        _calibrate(serving.calibration)
    num_devices = (cluster.gpus or 1) * cluster.nodes
    asked = Asked(
        serving.context,
        serving.batch,
        serving.memory,
        serving.disk_speed,
        serving.expert_memory,
        None if serving.machine is None else planned_machine(serving.machine, num_devices=num_devices),
        ASSUMED_ACCEPTANCE if serving.acceptance is None else serving.acceptance,
        serving.calibration,
        cluster.prices(num_devices),
        Mesh(serving.tensor_parallel, serving.expert_parallel),
    )
    plans = [plan_model(planned_model(name, serving.scheme, yarn=serving.yarn), asked) for name in models]
    if serving.picture is not None:
        write_plan_picture(serving.picture, plans)
    if as_json:
        print(json.dumps([plan_document(plan) for plan in plans], indent=2))
    else:
        print(format_plans(plans))
    if not any(plan.fits for plan in plans):
        raise DoesNotFit("; ".join(plan.problem for plan in plans))


def _calibrate(file: Path | None) -> None:
    """Progress goes to stderr."""
    import torch

    from qnext.bench.calibrate import calibrate
    from qnext.planning.calibration import calibration_file, write_calibration

    threads = torch.get_num_threads()
    place = calibration_file(threads) if file is None else file
    found = calibrate(date=str(date.today()), threads=threads, say=lambda text: print(text, file=sys.stderr))
    write_calibration(place, found)
    print(f"{place}: {found.told}", file=sys.stderr)


def _print_training(
    models: list[str], serving: ServingFlags, cluster: ClusterFlags, training: TrainingPlanFlags, *, as_json: bool
) -> None:
    from qnext.diagnostics.training_page import LoraWish, format_training, lora_wish, training_report
    from qnext.planning.accelerators import Cluster
    from qnext.planning.machines import planned_machine
    from qnext.planning.training_plan import KINDS, STATES, TrainingWish
    from qnext.session.planned import FLOAT_SCHEME, Asked, calibration_of, planned_model

    if training.train not in KINDS:
        raise UsageError(f"--train {training.train}: must be one of {', '.join(KINDS)}")
    if training.tokens is None:
        raise UsageError("--train: needs --tokens, such as 15T")
    if serving.tensor_parallel > 1:
        raise UsageError("--tensor-parallel: divides a model that answers; a training run has --expert-parallel")
    states = training.states or ("fp32" if serving.machine is None else "adamw")
    if states not in STATES:
        raise UsageError(f"--states {states}: must be one of {', '.join(STATES)}")
    found: Cluster | None = None
    if serving.machine is not None:
        found = planned_machine(serving.machine).cluster
        if found is None:
            raise UsageError(f"--machine {serving.machine}: training is planned on GPUs, or on this machine without it")
    wish = TrainingWish(
        training.train,
        training.tokens,
        training.sequence_length,
        training.mfu,
        states,
        training.recompute,
        training.sequences,
        serving.expert_parallel,
    )
    reports = []
    for name in models:
        model = planned_model(name, serving.scheme or FLOAT_SCHEME)
        wanted = wish
        if training.train == "lora":
            wanted = lora_wish(
                model.config, wish, LoraWish(training.lora, training.lora_rank), model.sizes.weight_bytes
            )
        num_devices = None if cluster.gpus is None else cluster.gpus * cluster.nodes
        measured = None if found else calibration_of(Asked(calibration=serving.calibration))
        peak = None if measured is None else measured.peaks("fp32").operations
        reports.append(
            training_report(model, wanted, found, num_devices=num_devices, prices=cluster.prices(1), peak=peak)
        )
    print(json.dumps([each.document() for each in reports], indent=2) if as_json else format_training(reports))
