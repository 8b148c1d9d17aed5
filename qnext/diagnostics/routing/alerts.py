"""Thresholds applied to what was found, and a baseline made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.config import ModelConfig
from qnext.diagnostics.routing.drift import Drift
from qnext.diagnostics.routing.findings import ComparedRecords
from qnext.diagnostics.routing.record import RoutingRecord
from qnext.planning.expert_alerts import (
    ExpertAlert,
    ExpertThresholds,
    Reference,
    alerts_of,
    measures_of,
    tokens_needed,
)
from qnext.planning.expert_baseline import ExpertBaseline
from qnext.planning.expert_shape import expert_shape


@dataclass(frozen=True)
class FoundAlert:
    """An alert of a load, and which load it is: the text, another text, another model."""

    of: str
    alert: ExpertAlert

    @property
    def line(self) -> str:
        return f"alert: {self.of}: {self.alert.line}"

    def document(self) -> dict[str, Any]:
        return {"of": self.of, **self.alert._asdict()}


@dataclass(frozen=True)
class Judging:
    """Thresholds, the baseline that a text is measured from, and the file that its own load is kept in. `note` tells
    people what matters beside."""

    thresholds: ExpertThresholds
    baseline: ExpertBaseline | None
    save_baseline: Path | None
    note: Callable[[str], None]

    def check(self, config: ModelConfig) -> None:
        """Raises UsageError for a baseline of another kind of model."""
        if self.baseline is not None:
            layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
            self.baseline.check(layers, config.num_experts, where="--baseline")

    def judge(self, found: ComparedRecords, *, model: str) -> list[FoundAlert]:
        """Keep the load, and apply the thresholds: to each other load, measured from that of the text; to the text,
        measured from the baseline, where there is one or nothing else."""
        record = found.record
        if self.save_baseline is not None:
            ExpertBaseline.of_blocks(model, record.layers, record.block_counts()).write(self.save_baseline)
            self.note(str(self.save_baseline))
        if not self.thresholds.by_measure():
            return []
        needed = tokens_needed(record.num_experts, record.chosen_LTA.shape[2])
        if record.num_tokens < needed:
            self.note(f"{record.num_tokens} tokens say little of {record.num_experts} experts; {needed:,} would")
        judged = []
        if self.baseline is not None or not found.others:
            judged.append(("the text", record, self._reference(record)))
        for other, drift in zip(found.others, found.findings.drifts, strict=True):
            judged.append((other.name, other.record, _reference_of(record, drift)))
        return [
            FoundAlert(name, alert)
            for name, load, reference in judged
            for alert in alerts_of(load.layers, measures_of(load.layers, load.counts(), reference), self.thresholds)
        ]

    def _reference(self, record: RoutingRecord) -> Reference | None:
        return None if self.baseline is None else Reference.of_baseline(self.baseline, record.layers, record.counts())


def _reference_of(record: RoutingRecord, drift: Drift) -> Reference:
    entropy_L = expert_shape(record.counts()).entropy_L.tolist()
    excess_L = [layer.excess for layer in drift.layers]
    return Reference(dict(zip(record.layers, entropy_L, strict=True)), dict(zip(record.layers, excess_L, strict=True)))
