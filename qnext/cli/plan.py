"""`qnext plan`: what fits into memory and how fast it will be, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qnext.cli.flags.sampling import ExpertMemory
from qnext.cli.flags.values import AsJson, Strict, human_int
from qnext.errors import DoesNotFit

_Size = Annotated[int | None, typer.Option(metavar="SIZE", parser=human_int, help="memory that is free, else as here")]
_Rate = Annotated[int | None, typer.Option(metavar="SIZE", parser=human_int, help="of the disk in a second, as 1.5g")]


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL|PRESET...", help="folders, hub names, or presets")],
    context: Annotated[int | None, typer.Option(min=1, help="tokens of a sequence, else 4,096")] = None,
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 1,
    memory: _Size = None,
    expert_memory: ExpertMemory = None,
    scheme: Annotated[str | None, typer.Option(help="bf16, or as of `qnext quantize`, with --records")] = None,
    disk_speed: _Rate = None,
    machine: Annotated[
        str | None, typer.Option(help="plan for another machine: its name or 24GiB,30GB/s,1.5GB/s")
    ] = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Say whether a model fits, what stays in memory of its experts, and how fast it will be.

    The disk is measured by reading some records of the folder, kernels by computing some experts, within a second or
    two. Of another machine published peaks count, and the shares of them that are reached. Exit code 4 where none of
    the models fits.
    """
    from qnext.diagnostics.plan import format_plans, plan_document, plan_model
    from qnext.planning.machines import planned_machine
    from qnext.session.planned import planned_model

    other = None if machine is None else planned_machine(machine)
    given = {"free_bytes": memory, "disk_rate": disk_speed, "expert_bytes": expert_memory}
    plans = [
        plan_model(planned_model(name, scheme), context=context, batch=batch, other=other, **given) for name in models
    ]
    if as_json:
        print(json.dumps([plan_document(plan) for plan in plans], indent=2))
    else:
        print(format_plans(plans))
    if not any(plan.fits for plan in plans):
        raise DoesNotFit("; ".join(plan.problem for plan in plans))
