"""The report of a run: one JSON object per line, and statistics of the experts."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qnext.errors import line_of, warn
from qnext.files import append, write_file
from qnext.planning.expert_shape import expert_shape
from qnext.training.health import Health


@dataclass(frozen=True)
class ExpertStats:
    """The use of the experts in one optimiser step: one entry per router in the order of the layers, MTP last."""

    max_over_mean: list[float]  # load of the busiest expert over the mean load; 1 is balanced
    num_dead: list[int]  # experts that no token was sent to
    entropy: list[float]  # of the load, over its largest possible value ln E; 1 is balanced
    load: list[list[int]]  # the tokens that each expert got


def expert_stats(counts_LE: Tensor) -> ExpertStats:
    """Statistics of assignment counts [L routers, E experts]."""
    shape = expert_shape(counts_LE.cpu().numpy())
    balance_L, dead_L = (1 / shape.balance_L).tolist(), shape.num_dead_L.tolist()
    return ExpertStats(balance_L, dead_L, shape.entropy_L.tolist(), counts_LE.tolist())


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one optimiser step. Losses are in nats per target, before their coefficients."""

    step: int  # steps done, this one included
    progress: float  # part of the run that was over when the step began
    tokens: int  # seen so far
    loss: float
    mtp_loss: float | None  # None while the MTP module is not trained
    balance: float | None  # None without routers
    z_loss: float | None
    lr: float
    grad_norm: float  # before clipping
    was_skipped: bool  # nothing was updated
    num_skipped: int  # so far
    epoch: int
    elapsed: float  # seconds of the whole run, earlier parts included
    tokens_per_second: float
    skipped_for: str | None = None  # "not finite", or what was a spike: "loss" or "gradient norm"
    experts: ExpertStats | None = None
    health: Health | None = None
    other_losses: dict[str, float] = field(default_factory=dict)  # of objectives with losses of their own, by name


class MetricsFile:
    """A JSONL file that a run appends to."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Lines of steps after `last_step` are dropped. A run that continued beyond its snapshot left them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists() and last_step > 0:
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
        write_file(path, "".join(line + "\n" for line in kept))
        self._path = path

    def write_step(self, metrics: StepMetrics) -> None:
        self._append(asdict(metrics))

    def write_evaluation(self, step: int, result: Any) -> None:
        """Write the result of an evaluation, a dataclass."""
        self._append({"step": step, "evaluation": asdict(result)})

    def write_sample(self, step: int, text: str) -> None:
        self._append({"step": step, "sample": text})

    def _append(self, record: dict[str, Any]) -> None:
        """A line that cannot be written is lost, with a warning: no run of days ends by that."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                append(descriptor, (json.dumps(record) + "\n").encode(), path=self._path)
            finally:
                os.close(descriptor)
        except OSError as error:
            warn(f"{line_of(error)}; lines of metrics are lost")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # the last line of a run that was killed may be cut
