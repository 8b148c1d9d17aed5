"""`qnext train reason`: a model that reasons, from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    has left its model is not run again.
    """
    from qnext.cli.terminal.ranks import refuse_ranks
    from qnext.cli.terminal.training import TrainingDisplay, run_to_the_end
    from qnext.errors import UsageError
    from qnext.ops import keep_freed_memory
    from qnext.recipes.reason import STAGES, finished, prepare_stage

    refuse_ranks("train reason")
    if not resume and any((out / name).exists() for name in STAGES):
        raise UsageError(f"{out} holds a run already; --resume continues it, another --out starts a new one")
    keep_freed_memory()
    for name in STAGES:
        if resume and finished(out, name):
            continue
        display = TrainingDisplay()
        display.note(f"stage {name}")
        stage = prepare_stage(name, out, seed=seed, settings=settings or [], resume=resume, hooks=display.hooks())
        display.describe(stage.trainer, stage.description, vocab_size=stage.vocab_size)
        stage.trainer.evaluate()
        run_to_the_end(stage.trainer, display, stage.save)
