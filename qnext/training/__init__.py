"""One loop that trains a model in place: data, losses, optimisers, schedule, snapshots."""

from __future__ import annotations

from qnext.training.config import TrainConfig, learning_rate
from qnext.training.data import PackedStream, TrainBatch
from qnext.training.loop import Diverged, Hooks, Trainer
from qnext.training.metrics import StepMetrics
from qnext.training.optimizer import decay_table, parameter_rules

__all__ = [
    "Diverged",
    "Hooks",
    "PackedStream",
    "StepMetrics",
    "TrainBatch",
    "TrainConfig",
    "Trainer",
    "decay_table",
    "learning_rate",
    "parameter_rules",
]
