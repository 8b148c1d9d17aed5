"""qnext train: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.division import DivisionFlags
from qnext.cli.flags.tuning import Resume
from qnext.cli.flags.watching import WatchFlags


def command(
    recipe: Annotated[str, typer.Argument(help="name of a recipe, such as small-code")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a training value; model.KEY for the model"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default runs/RECIPE")] = None,
    resume: Resume = False,
    *,
    ranks: DivisionFlags,
    watch: WatchFlags,
) -> None:
    """Train a model by a recipe. Leaves OUT/model, OUT/metrics.jsonl and OUT/snapshots.

    Ctrl-C and SIGTERM finish the step, save a snapshot and end with exit code 130 and 143; --resume goes on from there.
    Started by `torchrun -m qnext train`, its processes share the micro batches of each step and the parameters.
    """
    from qnext.cli.terminal.ranks import ranks_of_run
    from qnext.cli.terminal.training import TrainingDisplay, run_to_the_end
    from qnext.ops import keep_freed_memory
    from qnext.recipes import override
    from qnext.recipes import recipe as find_recipe
    from qnext.recipes.recipe import prepare
    from qnext.training.loggers import check_names

    chosen = override(find_recipe(recipe), settings or [])
    check_names(watch.log or ())
    keep_freed_memory()
    folder = out or Path("runs") / recipe
    with ranks_of_run(**ranks.division()) as together:
        display = TrainingDisplay(is_quiet=not together.is_first)
        display.note("reading text, making the tokenizer")
        run = prepare(chosen, folder, resume=resume, hooks=display.hooks(), ranks=together)
        display.describe(run.trainer, run.corpus.description, vocab_size=run.tokenizer.vocab_size)
        run_to_the_end(run.trainer, display, run.save, watch=watch)
