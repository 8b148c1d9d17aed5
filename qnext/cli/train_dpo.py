"""`qnext train dpo`: preference optimisation on files of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.division import DivisionFlags
from qnext.cli.flags.lora import LoraFlags
from qnext.cli.flags.tuning import BeginFlags, Out, Template
from qnext.cli.flags.watching import WatchFlags


def command(
    out: Out,
    base: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="the model to begin with, which is the reference")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="pairs (JSONL, JSON, parquet): prompt, chosen, rejected; may be given again"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a value of the training, such as beta=0.2")
    ] = None,
    template: Template = None,
    *,
    ranks: DivisionFlags,
    lora: LoraFlags,
    watch: WatchFlags,
    begin: BeginFlags,
) -> None:
    """Teach a model to prefer the chosen answer of a pair to the rejected one (DPO). Leaves OUT/model.

    With --lora it leaves OUT/adapter. Ctrl-C, SIGTERM and --resume are as in `qnext train sft`.
    """
    from qnext.cli.terminal.tuning import tune
    from qnext.recipes.tasks import task_of

    paths = [str(path) for path in data or []]
    task = task_of(
        out,
        base,
        paths,
        template=template,
        settings=settings or [],
        adapter=lora.task(),
        method="dpo",
        resume=begin.resume,
    )
    tune(task, out, ranks.division(), show_sample=begin.show_sample, resume=begin.resume, watch=watch)
