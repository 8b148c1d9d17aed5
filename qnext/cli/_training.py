"""What people see of a training run: the table of parameters, a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qnext.interrupts import raise_for
from qnext.training import Hooks, StepMetrics, TrainConfig, decay_table
from qnext.training.metrics import ExpertStats

if TYPE_CHECKING:
    from qnext.eval import Perplexity
    from qnext.recipes.recipe import Run
    from qnext.training import Trainer

_LINE_EVERY = 10  # steps between lines where there is no terminal


class TrainingDisplay:
    """Writes to stderr. Use as a context around the run, for the bar."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self.console,
            disable=not self.console.is_terminal,
        )  # fmt: skip
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

    def hooks(self, *, on_sample: Callable[[int], None] | None = None) -> Hooks:
        return Hooks(on_step=self._on_step, on_evaluation=self._on_evaluation, on_sample=on_sample)

    def describe(self, run: Run) -> None:
        """Data, precision, and which parameters are updated how."""
        trainer = run.trainer
        self.note(f"data: {run.corpus.description}")
        self.note(
            f"{trainer.stream.num_tokens:,} tokens per epoch, {self._config.tokens_per_step:,} per step; "
            f"{run.tokenizer.vocab_size} tokens in the vocabulary"
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
        table = Table("parameters", "decay", "optimiser", "tensors", "numbers", box=None)
        for row in decay_table(trainer.rules):
            decay = f"{self._config.weight_decay:g}" if row.has_decay else "-"
            table.add_row(row.kind, decay, row.algorithm, str(row.num_tensors), f"{row.num_parameters:,}")
        self.console.print(table)

    def _on_step(self, metrics: StepMetrics) -> None:
        self.last_experts = metrics.experts or self.last_experts
        mtp = "" if metrics.mtp_loss is None else f" mtp {metrics.mtp_loss:.3f}"
        line = f"step {metrics.step} loss {metrics.loss:.3f}{mtp} {metrics.tokens_per_second:,.0f} tok/s"
        self._progress.update(self._task, completed=metrics.progress, description=line)
        if metrics.was_skipped:
            self.note(f"step {metrics.step}: gradient norm {metrics.grad_norm}, not applied")
        if not self.console.is_terminal and (metrics.step % _LINE_EVERY == 0 or metrics.step == 1):
            self.note(f"{metrics.progress:4.0%} {line} lr {metrics.lr:.2g} norm {metrics.grad_norm:.2f}")

    def _on_evaluation(self, step: int, result: Perplexity) -> None:
        mtp = "" if result.mtp_acceptance is None else f", MTP draft accepted {result.mtp_acceptance:.1%}"
        self.note(f"step {step}: held-out {result.bits_per_byte:.4f} bits per byte{mtp}")


class Stop:
    """Which signal asked a run to end, if one did."""

    number: int | None = None

    def raise_for(self) -> None:
        """End the command as the signal does."""
        raise_for(self.number or signal.SIGINT)


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[Stop]:
    """While open, the first Ctrl-C, SIGTERM or SIGHUP ends the run after its step, the second one at once."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if trainer.should_stop:
            raise_for(number)
        stop.number = number
        trainer.should_stop = True
        print("finishing the step; Ctrl-C again ends at once", file=sys.stderr)

    numbers = [
        number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(number))
    ]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
