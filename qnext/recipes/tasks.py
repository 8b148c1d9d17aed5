"""What `qnext train sft`, `dpo`, `distill` and `gspo` are asked for becomes a task, and a task a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qnext.checkpoint.snapshot import list_snapshots
from qnext.errors import UsageError
from qnext.recipes.adapted import AdapterTask
from qnext.recipes.distill import Distill
from qnext.recipes.dpo import Dpo
from qnext.recipes.gspo import prepare_gspo
from qnext.recipes.instruct import Examination, chat_recipe
from qnext.recipes.methods import Method
from qnext.recipes.on_policy import OnPolicy
from qnext.recipes.sft import Sft
from qnext.recipes.tuning import TuningData, TuningRun, prepare_tuning, read_task
from qnext.recipes.tuning_task import TuningTask

_METHODS: dict[str, Callable[[], Method]] = {"sft": Sft, "dpo": Dpo, "distill": Distill, "on-policy": OnPolicy}

_VARIANTS = {"distill": ("on-policy",)}  # which the same command goes on with


def task_of(
    folder: Path,
    base: str | None,
    data: Sequence[str],
    *,
    recipe: str | None = None,
    template: str | None = None,
    settings: Sequence[str] = (),
    adapter: AdapterTask | None = None,
    method: str = "sft",
    resume: bool = False,
) -> TuningTask:
    """The task of a new run; or that of the run in `folder`, with more settings behind its own.

    `recipe` makes data and settings. Raises UsageError where `folder` holds a run and `resume` is false, or holds none
    and `resume` is true, and where something is missing.
    """
    if resume:
        if base is not None or data or any(each is not None for each in (template, recipe, adapter)):
            raise UsageError(
                "--resume takes --from, --data, --recipe, --template and --lora from the run in the folder"
            )
        task = TuningTask.read(folder)
        if task.method not in (method, *_VARIANTS.get(method, ())):
            raise UsageError(f"{folder} holds a run of {task.method}, not of {method}")
        return replace(task, settings=(*task.settings, *settings))
    if list_snapshots(folder / "snapshots"):
        raise UsageError(f"{folder} holds a run already; --resume continues it, another --out starts a new one")
    if base is None:
        raise UsageError("--from MODEL is missing")
    base = whole_path(base)
    if recipe is not None:
        if data or template is not None:
            raise UsageError("--recipe brings its own data and template")
        return replace(chat_recipe(recipe).task(base, folder, settings), adapter=adapter)
    if not data and method != "gspo":
        raise UsageError("--data FILE is missing")
    return TuningTask(
        base, tuple(map(os.path.abspath, data)), template, tuple(settings), adapter=adapter, method=method
    )


def whole_path(model: str) -> str:
    """A folder by its whole path: the run may go on from another one."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def read_data(task: TuningTask, folder: Path, **options: Any) -> TuningData:
    """As read_task, by the method of the task."""
    return read_task(task, folder, method=_METHODS[task.method](), **options)


def prepare_task(task: TuningTask, folder: Path, **options: Any) -> TuningRun:
    """As prepare_tuning, by the method of the task and with the examination of its recipe."""
    if task.method == "gspo":
        return prepare_gspo(task, folder, **options)
    if task.recipe is not None:
        options["examination"] = partial(Examination, num_questions=chat_recipe(task.recipe).num_tested)
    return prepare_tuning(task, folder, method=_METHODS[task.method](), **options)
