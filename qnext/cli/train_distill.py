"""`qnext train distill`: a student learns what a teacher says of texts and chats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.lora import LoraFlags
from qnext.cli.flags.tuning import Out, Resume, Template
from qnext.cli.flags.watching import WatchFlags


def command(
    out: Out,
    base: Annotated[str | None, typer.Option("--from", metavar="MODEL", help="the student as it begins")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="of the student's vocabulary, of any size and form")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="chats (JSONL, JSON, parquet), a text, or a folder of them; may be given again"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a value of the training, such as share=0.9")
    ] = None,
    template: Template = None,
    *,
    lora: LoraFlags,
    watch: WatchFlags,
    show_sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="show N samples, with what is learnt in colour, and end")
    ] = 0,
    resume: Resume = False,
) -> None:
    """Teach a student what a teacher says at every learnt token of your texts and chats. Leaves OUT/model.

    The teacher is asked once; its answers stay in OUT/data, and a run that was killed goes on asking where it stopped.
    With --lora it leaves OUT/adapter. Ctrl-C, SIGTERM and --resume are as in `qnext train sft`.
    """
    from qnext.cli.terminal.tuning import tune
    from qnext.errors import UsageError
    from qnext.recipes.tasks import task_of, whole_path

    if resume and teacher is not None:
        raise UsageError("--resume takes --teacher from the run in the folder")
    named = [] if teacher is None else [f"teacher={whole_path(teacher)}"]
    task = task_of(
        out,
        base,
        [str(path) for path in data or []],
        template=template,
        settings=[*named, *(settings or [])],
        adapter=lora.task(),
        method="distill",
        resume=resume,
    )
    tune(task, out, show_sample=show_sample, resume=resume, watch=watch)
