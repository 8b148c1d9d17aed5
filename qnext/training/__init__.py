"""One loop that trains a model in place: `Trainer`, `TrainConfig`, `TrainSource`, `Objective`.

`sources.py` finds texts, `data.py` packs them, the loop calls an objective and `optimizer.py`, and writes with
`metrics.py`. May import what stands below, but no engine. A new way to train is an `Objective` (`objective.py`), its
formulas go into `losses.py`, a new number of a run into `config.py`.
"""

from __future__ import annotations

from qnext.training.config import TrainConfig, learning_rate
from qnext.training.data import PackedStream, TrainBatch
from qnext.training.loop import Diverged, Hooks, Trainer
from qnext.training.metrics import StepMetrics
from qnext.training.objective import Losses, LossPart, NextToken, Objective, TrainSource, TrainStep
from qnext.training.optimizer import decay_table, parameter_rules

__all__ = [
    "Diverged",
    "Hooks",
    "LossPart",
    "Losses",
    "NextToken",
    "Objective",
    "PackedStream",
    "StepMetrics",
    "TrainBatch",
    "TrainConfig",
    "TrainSource",
    "TrainStep",
    "Trainer",
    "decay_table",
    "learning_rate",
    "parameter_rules",
]
