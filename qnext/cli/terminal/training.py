"""What people see of a training run: the table of parameters, a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qnext.cli.flags.watching import WatchFlags
from qnext.cli.terminal.text import note
from qnext.errors import warn
from qnext.planning import list_parameters
from qnext.training import Hooks, StepMetrics, Trainer, decay_table
from qnext.training.loggers import logged
from qnext.training.metrics import ExpertStats
from qnext.training.optimizer import lr_scale
from qnext.training.snapshot_writer import SnapshotFailed
from qnext.training.stopping import interruptible

_UNWATCHED = WatchFlags()
_LINE_EVERY = 10  # steps between lines where there is no terminal


class Summarised(Protocol):
    """The result of an evaluation."""

    @property
    def summary(self) -> str: ...


class TrainingDisplay:
    """Writes to stderr, or nothing. Use as a context around the run, for the bar."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=is_quiet)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=is_quiet or not self.console.is_terminal,
        )
        self.last_experts: ExpertStats | None = None
        self._task = self._progress.add_task("training", total=1.0)

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", soft_wrap=True, markup=False)

    def show_text(self, text: str) -> None:
        self.console.print(text, style="cyan", soft_wrap=True, markup=False)

    def hooks(self, *, on_sample: Callable[[int], str | None] | None = None) -> Hooks:
        return Hooks(on_step=self._on_step, on_evaluation=self._on_evaluation, on_sample=on_sample)

    def describe(self, trainer: Trainer, description: str, *, vocab_size: int) -> None:
        """Data, precision, and which parameters are updated how."""
        config = trainer.config
        self.note(f"data: {description}")
        self.note(
            f"{trainer.stream.num_tokens:,} tokens per epoch, {config.tokens_per_step:,} per step; "
            f"{vocab_size} tokens in the vocabulary"
        )
        choice = trainer.precision
        measured = ""
        if choice.float32_seconds is not None and choice.bfloat16_seconds is not None:
            measured = (
                f" (512 cubed: fp32 {choice.float32_seconds * 1e3:.2f} ms, bf16 {choice.bfloat16_seconds * 1e3:.2f} ms)"
            )
        self.note(f"precision: {choice.precision}{measured}; balance loss: counts of the step so far")
        if trainer.step:
            self.note(f"resumed at step {trainer.step}")
        self._describe_rules(trainer)

    def _describe_rules(self, trainer: Trainer) -> None:
        config, rows = trainer.config, decay_table(trainer.rules)
        table = Table("parameters", "decay", "optimiser", "peak lr", "tensors", "numbers", box=None)
        for row in rows:
            decay = f"{config.weight_decay:g}" if row.has_decay else "-"
            lr = f"{config.lr * lr_scale(row.algorithm, config):.2g}"
            table.add_row(row.kind, decay, row.algorithm, lr, str(row.num_tensors), f"{row.num_parameters:,}")
        trained = {rule.name for rule in trainer.rules}
        infos = list_parameters(trainer.model.config)
        if frozen := [math.prod(info.shape) for name, info in infos.items() if name not in trained]:
            table.add_row("not trained", "-", "-", "-", str(len(frozen)), f"{sum(frozen):,}")
        self.console.print(table)

    def _on_step(self, metrics: StepMetrics) -> None:
        self.last_experts = metrics.experts or self.last_experts
        mtp = "" if metrics.mtp_loss is None else f" mtp {metrics.mtp_loss:.3f}"
        drawn = metrics.other_losses.get("reward")
        reward = "" if drawn is None else f" reward {drawn:.3f}"
        line = f"step {metrics.step} loss {metrics.loss:.3f}{mtp}{reward} {metrics.tokens_per_second:,.0f} tok/s"
        self._progress.update(self._task, completed=metrics.progress, description=line)
        if metrics.was_skipped:
            self.note(f"step {metrics.step}: {_why_skipped(metrics)}; not applied, {metrics.num_skipped} so far")
        if not self.console.is_terminal and (metrics.step % _LINE_EVERY == 0 or metrics.step == 1):
            self.note(f"{metrics.progress:4.0%} {line} lr {metrics.lr:.2g} norm {metrics.grad_norm:.2f}")

    def _on_evaluation(self, step: int, result: Summarised) -> None:
        self.note(f"step {step}: {result.summary}")


def _why_skipped(metrics: StepMetrics) -> str:
    if metrics.skipped_for == "loss":
        return f"loss {metrics.loss:.4g} is a spike"
    spike = "" if metrics.skipped_for == "not finite" else " is a spike"
    return f"gradient norm {metrics.grad_norm:.4g}{spike}"


def _say_nothing(text: str) -> None:
    """The first process says it."""


def run_to_the_end(
    trainer: Trainer, display: TrainingDisplay, save: Callable[[], Path], *, watch: WatchFlags = _UNWATCHED
) -> None:
    """Train, and print the folder that `save` makes of the model. A signal ends the run with a snapshot."""
    with watched(trainer, watch):
        _run_to_the_end(trainer, display, save)


@contextmanager
def watched(trainer: Trainer, flags: WatchFlags) -> Iterator[None]:
    """While this is open, the numbers of the run go where the flags say."""
    assert trainer.folder is not None
    if not trainer.ranks.is_first:
        yield
        return
    with logged(trainer, trainer.folder, flags.log or ()), flags.serving(trainer.folder) as address:
        if address is not None:
            note(f"the page of this run: {address}")
        yield


def _run_to_the_end(trainer: Trainer, display: TrainingDisplay, save: Callable[[], Path]) -> None:
    tell = note if trainer.ranks.is_first else _say_nothing
    with interruptible(trainer, tell) as stop, display:
        trainer.run()
    if trainer.should_stop and not trainer.is_done:
        display.note(f"snapshot saved in {trainer.save()}; --resume continues")
        stop.raise_for()
    trainer.evaluate()
    if (best := trainer.best).is_over:
        display.note(
            f"the run ends early: none of the last {best.patience} evaluations was better than step {best.step}'s"
        )
    code = 0
    try:
        if trainer.config.snapshot_every:
            trainer.save()
    except SnapshotFailed as error:  # the model is a fraction of a snapshot: there may be room for it
        warn(str(error))
        code = error.exit_code
    if trainer.best.put_back():
        display.note(f"the model is that of step {trainer.best.step}, whose evaluation was the best")
    folder = save()
    display.note(f"{folder.name} saved in")
    if trainer.ranks.is_first:
        print(folder)
    if code:
        raise typer.Exit(code)
