"""`qnext plan`: what fits into memory and how fast it will be, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from qnext.cli.flags.sampling import ExpertMemory
from qnext.cli.flags.values import AsJson, Strict, human_int, option
from qnext.errors import DoesNotFit


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
    acceptance: Annotated[float | None, option("of each draft, else 0.65, an assumption", min=0.0, max=1.0)] = None


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL|PRESET...", help="folders, hub names, or presets")],
    *,
    serving: ServingFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Say what a model consists of, whether it fits, what stays in memory of its experts, and how fast it will be.

    The disk is measured by reading some records of the folder, kernels by computing some experts, within a second or
    two. Of another machine published peaks count, and the shares of them that are reached. Several models are put side
    by side. Exit code 4 where none of the models fits.
    """
    from qnext.diagnostics.plan import plan_document, plan_model
    from qnext.diagnostics.plan_page import format_plans
    from qnext.planning.machines import planned_machine
    from qnext.planning.speculation import ASSUMED_ACCEPTANCE
    from qnext.session.planned import Asked, planned_model

    asked = Asked(
        serving.context,
        serving.batch,
        serving.memory,
        serving.disk_speed,
        serving.expert_memory,
        None if serving.machine is None else planned_machine(serving.machine),
        ASSUMED_ACCEPTANCE if serving.acceptance is None else serving.acceptance,
    )
    plans = [plan_model(planned_model(name, serving.scheme), asked) for name in models]
    if as_json:
        print(json.dumps([plan_document(plan) for plan in plans], indent=2))
    else:
        print(format_plans(plans))
    if not any(plan.fits for plan in plans):
        raise DoesNotFit("; ".join(plan.problem for plan in plans))
