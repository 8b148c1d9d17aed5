"""`qnext train reason`: a model that reasons, from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qnext.cli.flags.tuning import Out, Resume


def command(
    out: Out = Path("runs/reason"),
    seed: Annotated[int, typer.Option(help="of weights, data and draws")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.KEY=VALUE", help="a value of pretrain, sft or gspo, as gspo.lr=1e-4"),
    ] = None,
    resume: Resume = False,
) -> None:
    """Train a small model from random weights to think: pretraining, SFT, then GSPO on sums. Leaves OUT/gspo/model.

    It takes a few minutes on two cores. Ctrl-C ends it after its step, and --resume goes on from there; a stage that
    has left its model is not run again. Started by `torchrun -m qnext train reason`, its processes share the work.
    """
    from qnext.cli.terminal.ranks import ranks_of_run
    from qnext.cli.terminal.training import TrainingDisplay, run_to_the_end
    from qnext.ops import keep_freed_memory
    from qnext.recipes.reason import prepare_stage, stages_left

    keep_freed_memory()
    with ranks_of_run() as ranks:
        for name in stages_left(out, resume=resume, ranks=ranks):
            display = TrainingDisplay(is_quiet=not ranks.is_first)
            display.note(f"stage {name}")
            options: dict[str, Any] = {"seed": seed, "settings": settings or [], "resume": resume, "ranks": ranks}
            stage = prepare_stage(name, out, hooks=display.hooks(), **options)
            display.describe(stage.trainer, stage.description, vocab_size=stage.vocab_size)
            stage.trainer.evaluate()
            run_to_the_end(stage.trainer, display, stage.save)
