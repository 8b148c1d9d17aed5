"""qnext train: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qnext.recipes.recipe import Run


def command(
    recipe: Annotated[str, typer.Argument(help="name of a recipe, such as small-code")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a training value; model.KEY for the model"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default runs/RECIPE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in the folder")] = False,
) -> None:
    """Train a model by a recipe. Leaves OUT/model, OUT/metrics.jsonl and OUT/snapshots.

    Ctrl-C and SIGTERM finish the step, save a snapshot and end with exit code 130 and 143; --resume goes on from there.
    """
    from qnext.cli._training import TrainingDisplay, interruptible
    from qnext.ops import keep_freed_memory
    from qnext.recipes import override
    from qnext.recipes import recipe as find_recipe
    from qnext.recipes.recipe import prepare

    chosen = override(find_recipe(recipe), settings or [])
    keep_freed_memory()
    folder = out or Path("runs") / recipe
    display = TrainingDisplay(chosen.train)
    display.note("reading text, making the tokenizer")
    run = prepare(chosen, folder, resume=resume, hooks=display.hooks())
    display.describe(run)
    with interruptible(run.trainer) as stop, display:
        run.trainer.run()
    if run.trainer.should_stop and not run.trainer.is_done:
        display.note(f"snapshot saved in {run.trainer.save()}; --resume continues")
        stop.raise_for()
    _finish(run, display)


def _finish(run: Run, display: Any) -> None:
    from qnext.errors import warn
    from qnext.training.loop import SnapshotFailed

    run.trainer.evaluate()
    code = 0
    try:
        if run.recipe.train.snapshot_every:
            run.trainer.save()
    except SnapshotFailed as error:  # the model is a fraction of a snapshot: there may be room for it
        warn(str(error))
        code = error.exit_code
    folder = run.save()
    display.note("model saved in")
    print(folder)
    if code:
        raise typer.Exit(code)
