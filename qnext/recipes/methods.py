"""What a way of fine-tuning makes of files of samples: documents, sample sets, a loss, and a look at held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.session.folder import ProgressOf
from qnext.text.lessons import Teacher
from qnext.training import Objective, TrainConfig, TrainSource
from qnext.training.build import Tokenizing
from qnext.training.ranks import ALONE, TrainingRanks
from qnext.training.samples import SampleSet, SampleStream
from qnext.training.shards import DataShard


@dataclass(frozen=True)
class DataConfig:
    """The choices of every run beside TrainConfig. Raises UsageError naming what is impossible."""

    epochs: float = 2.0  # passes over the data, where neither total_steps nor time_budget is set
    held_out: float = 0.02  # share of the samples that is evaluated on and not trained on
    weights: tuple[float, ...] | None = None  # shares of the sources; None: by their sizes

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out <= 0.5:
            raise UsageError(f"held_out must be between 0 and 0.5, not {self.held_out}")
        if not 0.0 < self.epochs < 1e6:
            raise UsageError(f"epochs must be above zero, not {self.epochs}")


class Base(NamedTuple):
    """The model that a run begins with, and what computes beside it."""

    model: CausalLM
    train: TrainConfig
    progress: ProgressOf
    ranks: TrainingRanks = ALONE


class Method(Protocol):
    """A way of fine-tuning. `sample` is its word for one document."""

    @property
    def sample(self) -> str: ...

    @property
    def config(self) -> type[DataConfig]: ...

    @property
    def asks_model(self) -> bool:
        """Whether each process has to have the model whole before the run begins."""

    def tokenizing(self, config: Any, teacher: Teacher, **facts: Any) -> Tokenizing:
        """`facts` are the other fields of Tokenizing."""

    def train_values(self, *, lr: float, sequence_length: int) -> Mapping[str, Any]:
        """Values of TrainConfig that differ from those that all methods share. `lr` is that of SFT."""

    def sets(self, config: Any, sources: Sequence[Sequence[DataShard]], base: Base) -> list[SampleSet]:
        """The samples of each source. All processes ask together; the first one writes what is to stand in files."""

    def source(self, config: Any, stream: SampleStream, base: Base) -> TrainSource:
        """What the run learns from, of its samples in their order: they themselves, or what is made of them. The model
        is not cut yet."""

    def objective(self, config: Any, train: TrainConfig) -> Objective | None: ...

    def evaluate(self, config: Any, model: CausalLM, held_out: SampleSet, train: TrainConfig) -> Any:
        """What goes to the metrics file: a dataclass with a `summary`."""
