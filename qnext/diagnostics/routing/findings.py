"""What is asked of the routers' choices, answered in one place for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qnext.diagnostics.routing.ablation import Ablation
from qnext.diagnostics.routing.agreement import Agreement, agreement
from qnext.diagnostics.routing.drift import Drift, drift
from qnext.diagnostics.routing.pairs import Coactivation, ExpertPair, coactivation
from qnext.diagnostics.routing.record import RoutingRecord
from qnext.diagnostics.routing.show import show_ablation, show_agreement, show_drift, show_pairs


@dataclass(frozen=True)
class RoutingFindings:
    """None stands for what was not asked."""

    pairs: Coactivation | None
    drifts: list[Drift]
    agreement: Agreement | None
    ablation: Ablation | None = None

    def show(self) -> None:
        if self.pairs is not None:
            show_pairs(self.pairs)
        for each in self.drifts:
            show_drift(each)
        if self.agreement is not None:
            show_agreement(self.agreement)
        if self.ablation is not None:
            show_ablation(self.ablation)

    def document(self) -> dict[str, Any]:
        """The parts that were asked for, for JSON."""
        found: dict[str, Any] = {}
        if self.pairs is not None:
            found["coactivation"] = [
                {"layer": each.label, "pairs": _pairs(each.pairs), "groups": each.groups} for each in self.pairs.layers
            ]
            found["transitions"] = [
                {"layer": each.label, "next": each.next_label, "pairs": _pairs(each.pairs)}
                | {"hit_ratio": each.hit_ratio, "hit_ratio_of_the_load": each.hit_ratio_without}
                for each in self.pairs.steps
            ]
        if self.drifts:
            found["drift"] = [
                {"of": each.of, "layers": [{**_row(layer), "is_real": layer.is_real} for layer in each.layers]}
                for each in self.drifts
            ]
        if self.agreement is not None:
            worst = [{"token": place, "overlap": part} for place, part in self.agreement.worst]
            rows = [_row(layer) for layer in self.agreement.layers]
            found["agreement"] = {"layers": rows, "by_position": self.agreement.by_position, "worst": worst}
        if self.ablation is not None:
            found["ablation"] = {
                "removal": self.ablation.removal,
                "bits_per_byte": self.ablation.bits_per_byte,
                "experts": [{**_row(each, "effect"), "is_real": each.is_real} for each in self.ablation.effects],
                "rank_correlations": self.ablation.rank_correlations,
                "mean_correlation": self.ablation.mean_correlation,
            }
        return found


@dataclass(frozen=True)
class OtherRecord:
    """What a record is compared with: of another text, or of the same tokens by another model."""

    name: str
    record: RoutingRecord


@dataclass(frozen=True)
class ComparedRecords:
    """A record, those that it was compared with, in the order of the drifts, and what was found."""

    record: RoutingRecord
    others: list[OtherRecord]
    findings: RoutingFindings


def compare_records(
    record: RoutingRecord,
    *,
    num_pairs: int | None,
    other_text: OtherRecord | None = None,
    other_model: OtherRecord | None = None,
    ablation: Ablation | None = None,
) -> ComparedRecords:
    """Of a record: its pairs, unless `num_pairs` is None; its drift to another text; its drift to another model, and
    its agreement with it; with what was found of it without experts. Raises UsageError where they do not compare."""
    drifts = []
    if other_text is not None:
        drifts.append(drift(record, other_text.record, of=f"the text to {other_text.name}", is_paired=False))
    if other_model is not None:
        drifts.append(drift(record, other_model.record, of=f"the model to {other_model.name}", is_paired=True))
    findings = RoutingFindings(
        pairs=None if num_pairs is None else coactivation(record, num_pairs=num_pairs),
        drifts=drifts,
        agreement=None if other_model is None else agreement(record, other_model.record),
        ablation=ablation,
    )
    return ComparedRecords(record, [each for each in (other_text, other_model) if each is not None], findings)


def _pairs(pairs: Sequence[ExpertPair]) -> list[dict[str, Any]]:
    return [{**asdict(each), "information": each.information} for each in pairs]


def _row(found: Any, interval: str = "interval") -> dict[str, Any]:
    """A dataclass with a label and an interval, the words as in the rest of the document."""
    values = asdict(found)
    value, low, high = values.pop(interval)
    named = {} if interval == "interval" else {interval: value}
    return {"layer": values.pop("label"), **values, **named, "low": low, "high": high}
