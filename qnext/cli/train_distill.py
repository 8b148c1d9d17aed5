"""`qnext train distill`: a student learns what a teacher says of texts and chats."""

from __future__ import annotations

from typing import Annotated

import typer

from qnext.cli.flags.division import DivisionFlags
from qnext.cli.flags.lora import LoraFlags
from qnext.cli.flags.teacher import TeacherFlags
from qnext.cli.flags.tuning import BeginFlags, Out, SampleFiles, Template
from qnext.cli.flags.watching import WatchFlags


def command(
    out: Out,
    base: Annotated[str | None, typer.Option("--from", metavar="MODEL", help="the student as it begins")] = None,
    data: SampleFiles = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a value of the training, such as share=0.9")
    ] = None,
    template: Template = None,
    *,
    ranks: DivisionFlags,
    teacher: TeacherFlags,
    lora: LoraFlags,
    watch: WatchFlags,
    begin: BeginFlags,
) -> None:
    """Teach a student what a teacher says at every learnt token of your texts and chats. Leaves OUT/model.

    The teacher is asked once; its answers stay in OUT/data, and a run that was killed goes on asking where it stopped.
    With --on-policy it stays in memory, and is asked about what the student answers to the prompts of the data.
    With --lora it leaves OUT/adapter. Ctrl-C, SIGTERM and --resume are as in `qnext train sft`.
    """
    from qnext.cli.terminal.tuning import tune
    from qnext.recipes.tasks import task_of

    task = task_of(
        out,
        base,
        [str(path) for path in data or []],
        template=template,
        settings=[*teacher.settings(resume=begin.resume), *(settings or [])],
        adapter=lora.task(),
        method=teacher.method,
        resume=begin.resume,
    )
    tune(task, out, ranks.division(), show_sample=begin.show_sample, resume=begin.resume, watch=watch)
