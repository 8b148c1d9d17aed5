"""Supervised fine-tuning: what it makes of the plan that all fine-tuning shares (qnext/recipes/tuning.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.recipes.methods import Base, DataConfig
from qnext.text.lessons import TAUGHT, Taught, Teacher
from qnext.text.samples import FORMS
from qnext.training import TrainConfig, TrainSource
from qnext.training.build import Tokenizing
from qnext.training.held_out import HeldOutLoss, held_out_loss
from qnext.training.samples import SampleSet, SampleStream
from qnext.training.shards import DataShard


@dataclass(frozen=True)
class SftConfig(DataConfig):
    """The choices of supervised fine-tuning. Raises UsageError naming what is impossible."""

    taught: Taught = "assistant"
    form: str | None = None  # of all samples; None: of each by its keys

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taught not in TAUGHT:
            raise UsageError(f"taught must be one of {', '.join(TAUGHT)}, not {self.taught!r}")
        if self.form is not None and self.form not in FORMS:
            raise UsageError(f"form must be one of {', '.join(FORMS)}, not {self.form!r}")


class Sft:
    """Supervised fine-tuning as a Method."""

    sample = "samples"
    config = SftConfig
    asks_model = False

    def tokenizing(self, config: SftConfig, teacher: Teacher, **facts: Any) -> Tokenizing:
        made_with = {**facts.pop("made_with"), "taught": config.taught, "form": config.form}
        return Tokenizing(replace(teacher, taught=config.taught), made_with=made_with, form=config.form, **facts)

    def train_values(self, *, lr: float, sequence_length: int) -> dict[str, Any]:
        return {}

    def sets(self, config: SftConfig, sources: Sequence[Sequence[DataShard]], base: Base) -> list[SampleSet]:
        return [SampleSet(shards) for shards in sources]

    def source(self, config: SftConfig, stream: SampleStream, base: Base) -> TrainSource:
        return stream

    def objective(self, config: SftConfig, train: TrainConfig) -> None:
        return None

    def evaluate(self, config: SftConfig, model: CausalLM, held_out: SampleSet, train: TrainConfig) -> HeldOutLoss:
        return held_out_loss(model, held_out, tokens_per_batch=train.tokens_per_batch)
