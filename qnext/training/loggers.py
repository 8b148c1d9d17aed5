"""Logs of a run for other programs, beside metrics.jsonl: TensorBoard's event files, and Weights & Biases."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from qnext.errors import UsageError, did_you_mean, warn
from qnext.training.event_file import EventFile
from qnext.training.loop import Trainer
from qnext.training.metrics import StepMetrics

TENSORBOARD, WANDB = "tensorboard", "wandb"
_NAMES = (TENSORBOARD, WANDB)
_LONG = ("load", "decay")  # lists of lists, which pictures show


class RunLog(Protocol):
    """Takes the numbers of a run. What it raises ends the log, and not the run."""

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


class TensorBoardLog:
    """`<run>/tensorboard`, for `tensorboard --logdir`. TensorBoard itself need not be installed."""

    def __init__(self, folder: Path) -> None:
        self._file = EventFile(folder / TENSORBOARD)

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._file.write(step, numbers, texts)

    def close(self) -> None:
        pass


class WandbLog:
    """A run of Weights & Biases in the project qnext. WANDB_MODE=offline, WANDB_PROJECT and the like are its own."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module(WANDB)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "qnext"),
            name=folder.name,
            group=folder.name,
            dir=str(folder),
            config=dict(config),
        )

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._run.log({**numbers, **texts}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError naming a log that there is not."""
    for name in names:
        if name not in _NAMES:
            raise UsageError(f"--log {name}: expected {' or '.join(_NAMES)}{did_you_mean(name, _NAMES)}")


@contextmanager
def logged(trainer: Trainer, folder: Path, names: Sequence[str]) -> Iterator[None]:
    """While this is open, what the run reports goes to these logs too. A log that fails is left out, with a warning."""
    logs = _Logs(folder, names, asdict(trainer.config))
    hooks = trainer.hooks
    trainer.hooks = replace(
        hooks,
        on_step=_after(hooks.on_step, logs.step),
        on_evaluation=_after(hooks.on_evaluation, logs.evaluation),
        on_sample=None if hooks.on_sample is None else _passing(hooks.on_sample, logs.sample),
    )
    try:
        yield
    finally:
        trainer.hooks = hooks
        logs.close()


class _Logs:
    def __init__(self, folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> None:
        self._logs: dict[str, RunLog] = {}
        for name in dict.fromkeys(names):
            with self._going_on(name):
                self._logs[name] = TensorBoardLog(folder) if name == TENSORBOARD else WandbLog(folder, config)

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            if error.name != name:
                self._lose(name, error)
            else:
                self._lose(name, "it is not installed; pip install 'qnext[watch]'")
        except Exception as error:  # a service's own errors are of any kind
            self._lose(name, error)

    def _lose(self, name: str, reason: object) -> None:
        self._logs.pop(name, None)
        warn(
            f"--log {name}: {' '.join(str(reason).split()) or type(reason).__name__}; the run goes on without this log"
        )

    def _write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, log in list(self._logs.items()):
            with self._going_on(name):
                log.write(step, numbers, texts)

    def step(self, metrics: StepMetrics) -> None:
        numbers = dict(_flat(asdict(metrics)))
        step = int(numbers.pop("step"))
        self._write(step, numbers, {})

    def evaluation(self, step: int, result: Any) -> None:
        self._write(step, dict(_flat(asdict(result), "evaluation/")), {})

    def sample(self, step: int, text: str | None) -> None:
        if text is not None:
            self._write(step, {}, {"sample": text})

    def close(self) -> None:
        for name, log in list(self._logs.items()):
            with self._going_on(name):
                log.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested records by path: `experts/num_dead/3`."""
    for key, value in values.items():
        if isinstance(value, bool | int | float):
            yield f"{prefix}{key}", float(value)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list) and key not in _LONG:
            yield from _flat({str(index): each for index, each in enumerate(value)}, f"{prefix}{key}/")


def _after(first: Any, then: Any) -> Any:
    def both(*arguments: Any) -> None:
        if first is not None:
            first(*arguments)
        then(*arguments)

    return both


def _passing(sample: Any, then: Any) -> Any:
    def both(step: int) -> str | None:
        text = sample(step)
        then(step, text)
        return text

    return both
