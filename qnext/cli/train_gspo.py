"""`qnext train gspo`: reasoning by reinforcement on problems with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.lora import LoraFlags
from qnext.cli.flags.tuning import Out, Resume, Template
from qnext.cli.flags.watching import WatchFlags


def command(
    out: Out,
    base: Annotated[str | None, typer.Option("--from", metavar="MODEL", help="the model to begin with")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="problems that come with qnext: sums")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="problems (JSONL, JSON, parquet): prompt or messages, and answer; may be given again"),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="exact: the same text; numeric: the same last number", metavar="exact|numeric")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a value of the training, such as group_size=16"),
    ] = None,
    template: Template = None,
    *,
    lora: LoraFlags,
    watch: WatchFlags,
    resume: Resume = False,
) -> None:
    """Let a model answer problems and learn from the answers that are right (GSPO). Leaves OUT/model.

    With --lora it leaves OUT/adapter. Ctrl-C, SIGTERM and --resume are as in `qnext train sft`.
    """
    from qnext.cli.terminal.tuning import tune
    from qnext.recipes.tasks import task_of

    named = {"task": task, "reward": reward}
    tuning = task_of(
        out,
        base,
        [str(path) for path in data or []],
        template=template,
        settings=[*(f"{key}={value}" for key, value in named.items() if value is not None), *(settings or [])],
        adapter=lora.task(),
        method="gspo",
        resume=resume,
    )
    tune(tuning, out, show_sample=0, resume=resume, watch=watch)
