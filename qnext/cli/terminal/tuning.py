"""What people see of fine-tuning: samples of what is learnt, or the run and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from qnext.cli.flags.watching import WatchFlags
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.ranks import ranks_of_run, refuse_ranks
from qnext.cli.terminal.samples import show
from qnext.cli.terminal.training import TrainingDisplay, run_to_the_end
from qnext.ops import keep_freed_memory
from qnext.recipes.tasks import prepare_task, read_data
from qnext.recipes.tuning import TuningRun
from qnext.recipes.tuning_task import TuningTask
from qnext.session.folder import no_progress
from qnext.training.loggers import check_names

_UNWATCHED = WatchFlags()
ALL_ALIKE: Mapping[str, int] = {}


def tune(
    task: TuningTask,
    out: Path,
    division: Mapping[str, int] = ALL_ALIKE,
    *,
    show_sample: int,
    resume: bool,
    watch: WatchFlags = _UNWATCHED,
) -> None:
    """Run a task in its folder to the end; or show `show_sample` samples of its data, if not zero. `division` is that
    of ranks_of_run."""
    check_names(watch.log or ())
    keep_freed_memory()
    if show_sample:
        refuse_ranks("--show-sample")
        show(read_data(task, out, progress=byte_progress), show_sample)
        return
    with ranks_of_run(**division) as ranks:
        display = TrainingDisplay(is_quiet=not ranks.is_first)
        progress = byte_progress if ranks.is_first else no_progress
        run = prepare_task(task, out, resume=resume, hooks=display.hooks(), progress=progress, ranks=ranks)
        display.describe(run.trainer, run.data.description, vocab_size=run.data.tokenizer.vocab_size)
        if run.adapted:
            display.note(f"adapter: {run.adapted}")
        run.trainer.evaluate()
        run_to_the_end(run.trainer, display, partial(_save, run, display), watch=watch)


def _save(run: TuningRun, display: TrainingDisplay) -> Path:
    folder = run.save()
    for line in run.changes():
        display.note(line)
    return folder
