"""`qnext train sft`: supervised fine-tuning on files of samples."""

from __future__ import annotations

from typing import Annotated

import typer

from qnext.cli.flags.division import DivisionFlags
from qnext.cli.flags.lora import LoraFlags
from qnext.cli.flags.tuning import BeginFlags, Out, SampleFiles, Template
from qnext.cli.flags.watching import WatchFlags


def command(
    out: Out,
    base: Annotated[str | None, typer.Option("--from", metavar="MODEL", help="the model to begin with")] = None,
    data: SampleFiles = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a value of the training, such as epochs=3")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="instruct or thinking: questions with known answers, for the demo's model")
    ] = None,
    template: Template = None,
    *,
    ranks: DivisionFlags,
    lora: LoraFlags,
    watch: WatchFlags,
    begin: BeginFlags,
) -> None:
    """Teach a model to answer as the assistant does in your chats. Leaves OUT/model, which chats and serves.

    With --lora it leaves OUT/adapter, for `qnext serve MODEL --lora NAME=OUT` and `qnext merge OUT FOLDER`.

    Ctrl-C and SIGTERM finish the step, save a snapshot and end with exit code 130 and 143; --resume goes on from there,
    and from the last snapshot after a kill.
    Started by `torchrun -m qnext train sft`, its processes share the work; so do those of `dpo`, `distill`, `gspo`.
    """
    from qnext.cli.terminal.tuning import tune
    from qnext.recipes.tasks import task_of

    paths = [str(path) for path in data or []]
    task = task_of(
        out,
        base,
        paths,
        recipe=recipe,
        template=template,
        settings=settings or [],
        adapter=lora.task(),
        resume=begin.resume,
    )
    tune(task, out, ranks.division(), show_sample=begin.show_sample, resume=begin.resume, watch=watch)
