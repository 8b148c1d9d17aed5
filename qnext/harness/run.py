"""Runs tasks of lm-evaluation-harness on a model of this process or on a server, and reads its results."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple

from qnext.errors import UsageError
from qnext.harness.tables import PublishedRow

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class HarnessRun:
    """What is asked. `include_path` is a folder with tasks of your own, in the harness's YAML form."""

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    is_chat: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    include_path: str | None = None
    runs_code: bool = False
    seed: int = 1234
    metadata: Mapping[str, Any] = field(default_factory=dict)  # which tasks that are made on the spot read


class HarnessScore(NamedTuple):
    """A metric of a task, as the harness names it, with its standard error where it has one."""

    task: str
    metric: str
    value: float
    error: float | None
    num_samples: int | None


def evaluate_tasks(model: LM, run: HarnessRun) -> list[HarnessScore]:
    """Raises UsageError, in one line, for an unknown task and for data that cannot be had."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = TaskManager(include_path=run.include_path, include_defaults=False) if run.include_path else None
    if manager is None or not all(manager.match_tasks([task]) for task in run.tasks):
        manager = TaskManager(include_path=run.include_path)  # reads thousands of files
    unknown = [task for task in run.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"lm-eval has no task {unknown[0]!r}; --include-path names a folder with tasks of your own")
    options: dict[str, Any] = {
        "num_fewshot": run.num_fewshot,
        "limit": run.limit,
        "apply_chat_template": run.is_chat,
        "gen_kwargs": dict(run.sampling) or None,
        "metadata": dict(run.metadata) or None,
        "confirm_run_unsafe_code": run.runs_code,
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), run.seed),
    }
    tasks = manager.match_tasks(list(run.tasks))
    try:
        with _quiet_unless_watched():
            results = simple_evaluate(
                model=model, tasks=tasks, task_manager=manager, bootstrap_iters=100, log_samples=False, **options
            )
    except Exception as error:
        if not _is_download(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{', '.join(run.tasks)}: the data set cannot be had ({type(error).__name__}: {reason}); the harness takes "
            "it from the hub, so run this with a network, or with a copy in HF_HOME"
        ) from None
    return _scores(results)


@contextmanager
def _quiet_unless_watched() -> Iterator[None]:
    """The harness draws its bars wherever stderr leads; only a terminal is to show them."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield


def _is_download(error: BaseException) -> bool:
    """Whether what failed was getting data: an error of a network, of the hub, or of a place that is not there."""
    modules = {type(each).__module__.split(".")[0] for each in _chain(error)}
    names = {type(each).__name__ for each in _chain(error)}
    return bool(modules & {"requests", "httpx", "urllib3", "huggingface_hub"}) or bool(
        names & {"ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _scores(results: Mapping[str, Any]) -> list[HarnessScore]:
    found = []
    counts = results.get("n-samples", {})
    for task, metrics in results["results"].items():
        for metric, value in metrics.items():
            if (
                isinstance(value, (int, float))
                and "_stderr" not in metric
                and metric not in ("sample_len", "sample_count")
            ):
                name, _, filtered = metric.partition(",")
                error = metrics.get(f"{name}_stderr,{filtered}")
                is_number = isinstance(error, (int, float)) and math.isfinite(error)
                number = counts.get(task, {}).get("effective")
                found.append(HarnessScore(task, metric, float(value), float(error) if is_number else None, number))
    return found


def run_of(row: PublishedRow, asked: HarnessRun) -> HarnessRun:
    """A row of a table with its settings; the sampling that is asked for counts first."""
    sampling = {**row.sampling, **asked.sampling}
    return replace(asked, tasks=row.tasks, num_fewshot=row.num_fewshot, is_chat=row.is_chat, sampling=sampling)


def value_of(row: PublishedRow, scores: Sequence[HarnessScore]) -> float | None:
    """The mean over the tasks of a row in percent: those of its names, or all that a tag of the harness stands for."""
    wanted = row.metric.split("|")
    fitting = [each for each in scores if each.metric in wanted or each.metric.partition(",")[0] in wanted]
    named = [each for each in fitting if any(fnmatch(each.task, pattern) for pattern in row.tasks)]
    chosen = named or fitting
    return 100 * sum(each.value for each in chosen) / len(chosen) if chosen else None
