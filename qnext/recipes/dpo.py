"""Preference optimisation (DPO) on files of pairs: what it makes of the plan that all fine-tuning shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnext.engine.storage.fingerprint import weights_digest
from qnext.files import remove_file
from qnext.model import CausalLM
from qnext.recipes.methods import Base, DataConfig
from qnext.text.lessons import Teacher
from qnext.training import TrainConfig, TrainSource
from qnext.training.build import PairTokenizing
from qnext.training.preference import (
    PAIRS,
    REFERENCES,
    DirectPreference,
    HeldOutPreference,
    held_out_preference,
    with_reference,
)
from qnext.training.samples import SampleSet, SampleStream
from qnext.training.shards import DataShard

_LR = 0.1  # of that of SFT: the loss asks for a difference, not for an answer


@dataclass(frozen=True)
class DpoConfig(DataConfig):
    """The choices of preference optimisation: see DirectPreference. Raises UsageError naming what is impossible."""

    epochs: float = 1.0
    beta: float = 0.1
    by_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.objective

    @property
    def objective(self) -> DirectPreference:
        return DirectPreference(self.beta, self.by_length)


class Dpo:
    """Preference optimisation as a Method. The base, as it is before the run, is the reference."""

    sample = "answers"
    config = DpoConfig
    asks_model = False  # its processes do so together

    def tokenizing(self, config: DpoConfig, teacher: Teacher, **facts: Any) -> PairTokenizing:
        made_with = {**facts.pop("made_with"), "pairs": True}
        return PairTokenizing(teacher, made_with=made_with, **facts)

    def train_values(self, *, lr: float, sequence_length: int) -> dict[str, Any]:
        return {
            "lr": _LR * lr,
            "tokens_per_batch": max(2 * sequence_length, 4096),
            "balance_coefficient": 0.0,
            "mtp_coefficient": 0.0,
            "precision": "float32",  # as the references: a margin is a small difference of large sums
        }

    def sets(self, config: DpoConfig, sources: Sequence[Sequence[DataShard]], base: Base) -> list[SampleSet]:
        """Pairs with the scores of the reference, which are computed once and stand beside the shards."""
        digest = weights_digest(base.model, whole=base.ranks.value).hex()
        options: dict[str, Any] = {"of": digest, "tokens_per_batch": base.train.tokens_per_batch, "ranks": base.ranks}
        total = sum(shard.path.stat().st_size for shards in sources for shard in shards)
        sets, done = [], 0
        with base.progress("scoring by the reference") as report:
            for shards in sources:
                pairs = []
                for shard in shards:
                    pairs.append(with_reference(shard, base.model, **options))
                    done += shard.path.stat().st_size
                    if report is not None:
                        report(done, total)
                sets.append(SampleSet(pairs, kind=PAIRS))
        base.ranks.by_first(lambda: _remove_others([shard for shards in sources for shard in shards]))
        return sets

    def source(self, config: DpoConfig, stream: SampleStream, base: Base) -> TrainSource:
        return stream

    def objective(self, config: DpoConfig, train: TrainConfig) -> DirectPreference:
        return replace(config.objective, balance=train.balance_coefficient, z=train.z_loss_coefficient)

    def evaluate(
        self, config: DpoConfig, model: CausalLM, held_out: SampleSet, train: TrainConfig
    ) -> HeldOutPreference:
        return held_out_preference(model, config.objective, held_out, tokens_per_batch=train.tokens_per_batch)


def _remove_others(shards: Sequence[DataShard]) -> None:
    """References of shards that are no more."""
    kept = {shard.path.with_suffix(REFERENCES) for shard in shards}
    for folder in {path.parent for path in kept}:
        for path in set(folder.glob(f"*{REFERENCES}")) - kept:
            remove_file(path)
