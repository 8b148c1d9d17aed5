"""C5 to C7: what the small models show, seed by seed: arms of one seed saw the same tokens in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log2
from operator import itemgetter
from typing import Any

from qnext.checkpoint import load_model
from qnext.claims.claim import Findings, Grid, Picture, Workplace
from qnext.claims.notebook import Measured, Point
from qnext.claims.training.ablations import RecallRuns, TextRuns, model_folder, run_name, values_of
from qnext.claims.training.arms import (
    EXPERTS,
    FULL,
    FULL_UNGATED,
    HYBRID,
    HYBRID_UNGATED,
    LINEAR,
    MICRO_BALANCE,
    STEP_BALANCE,
    Arm,
)
from qnext.claims.training.texts import code_text
from qnext.diagnostics.charts import Axis, Curve, LineChart
from qnext.eval.intervals import Interval, mean_interval
from qnext.planning import count_active, count_parameters
from qnext.probe import look

_KINDS = (HYBRID, FULL, LINEAR)
_GATES = ((HYBRID, HYBRID_UNGATED), (FULL, FULL_UNGATED))
_BALANCES = (STEP_BALANCE, MICRO_BALANCE)


@dataclass(frozen=True)
class HybridRatio:
    """C5: three linear layers to a full one, against either kind alone."""

    text: TextRuns
    recall: RecallRuns
    rates: tuple[float, ...] = ()  # of learning, times that of all runs: whether one rate is unfair to an arm

    def points(self, at: Workplace) -> Iterable[Point]:
        others = [point for rate in self.rates for point in self.recall.at_rate(rate).points(_KINDS, at.folder)]
        return [*self.text.points(_KINDS, at.folder), *self.recall.points(_KINDS, at.folder), *others]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        losses = {arm.name: _numbers(known, "text", arm, self.text.seeds, _loss) for arm in _KINDS}
        recalls = {arm.name: _numbers(known, "recall", arm, self.recall.seeds, _mean) for arm in _KINDS}
        values: dict[str, Interval] = {}
        for other in (FULL, LINEAR):
            values |= _difference(f"loss_minus_{other.name}", losses["hybrid"], losses[other.name])
            values |= _difference(f"recall_minus_{other.name}", recalls["hybrid"], recalls[other.name])
        rows = [
            [
                arm.name,
                f"{count_parameters(arm.config(self.text.budget.base)).total:,}",
                f"{self.text.budget.steps(arm) * self.text.budget.tokens_per_step:,}",
                _text(losses[arm.name], "{:.3f}"),
                _text(recalls[arm.name], "{:.3f}"),
            ]
            for arm in _KINDS
        ]
        header = ["layers", "parameters", "tokens", "bits per byte", "recall, mean of all tested"]
        grids = [Grid("Equal operations: means of the seeds, with 95 %", header, rows)]
        grids += [*recall_grids(self.recall, known, _KINDS), *self._rate_grids(known)]
        return Findings(self.setting, values, grids)

    def _rate_grids(self, known: Mapping[str, Measured]) -> list[Grid]:
        rows = []
        for rate in self.rates:
            runs = self.recall.at_rate(rate)
            found = [_numbers(known, runs.label, arm, 1, _mean) for arm in _KINDS]
            rows.append([f"{rate:g}x", *(f"{each[0]:.3f}" if each else "-" for each in found)])
        header = ["learning rates", *(arm.name for arm in _KINDS)]
        return [Grid("Recall at other learning rates, mean of all tested, one seed", header, rows)] if rows else []

    @property
    def setting(self) -> str:
        budget, recall = self.text.budget, self.recall
        return (
            f"{budget.base.num_hidden_layers} layers of width {budget.base.hidden_size}, {self.text.seeds} seeds, "
            f"{budget.flops:.1e} operations of training each, on the standard library of Python; bits per byte on "
            f"packages that no model has seen. Recall: models of the same form trained with {recall.budget.flops:.1e} "
            f"operations on {recall.task} of {max(shape.length for shape in recall.shapes)} tokens, share of right "
            "answers. All arms have the same learning rates, tuned for none."
        )


def recall_grids(runs: RecallRuns, known: Mapping[str, Measured], arms: Sequence[Arm]) -> list[Grid]:
    """The share of right answers of each tested shape."""
    found = {arm.name: values_of(known, "recall", arm, runs.seeds) for arm in arms}
    rows = [
        [
            str(shape.length),
            str(shape.num_facts),
            *(_text([each[i] for each in found[arm.name]], "{:.2f}") for arm in arms),
        ]
        for i, shape in enumerate(runs.tested)
    ]
    header = ["tokens", "pairs", *(arm.name for arm in arms)]
    return [Grid("Recall: right answers", header, rows)] if any(found.values()) else []


@dataclass(frozen=True)
class RecallLength:
    """C10: the models of C5, trained on short problems and asked at longer ones."""

    recall: RecallRuns

    def points(self, at: Workplace) -> Iterable[Point]:
        return self.recall.points(_KINDS, at.folder)

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        few = min(shape.num_facts for shape in self.recall.tested)
        at = [i for i, shape in enumerate(self.recall.tested) if shape.num_facts == few]
        lengths = [self.recall.tested[i].length for i in at]
        found = {arm.name: values_of(known, "recall", arm, self.recall.seeds) for arm in _KINDS}
        values = {}
        for i, length in zip(at[1:], lengths[1:], strict=True):
            kept = [each[i] / each[at[0]] if each[at[0]] else 0.0 for each in found["hybrid"]]
            if kept:
                values[f"kept_at_{length // lengths[0]}x"] = mean_interval(kept)
        curves = [
            Curve(name, lengths, [mean_interval([each[i] for each in runs]).value for i in at])
            for name, runs in found.items()
            if runs
        ]
        title = f"Recall of {few} pairs"
        chart = LineChart(title, Axis("tokens", is_log=True), Axis("right answers", high=1.0), curves)
        setting = (
            f"The recall models of C5, trained on {self.recall.task} of up to "
            f"{max(shape.length for shape in self.recall.shapes)} tokens, asked at lengths that they never saw: "
            f"{self.recall.num_problems} problems each, {few} pairs, what lies between is filler."
        )
        pictures = [Picture("recall", title, [chart])] if curves else []
        return Findings(setting, values, recall_grids(self.recall, known, _KINDS), pictures)


@dataclass(frozen=True)
class Gates:
    """C6: the output gate of attention, on and off."""

    text: TextRuns

    def points(self, at: Workplace) -> Iterable[Point]:
        arms = [arm for pair in _GATES for arm in pair]
        looks = [self._look(at, arm, seed) for seed in range(self.text.seeds) for arm in arms]
        return [*self.text.points(arms, at.folder), *looks]

    def _look(self, at: Workplace, arm: Arm, seed: int) -> Point:
        return Point(run_name("look", arm, seed), self.text.facts(arm, seed), partial(self._measure, at, arm, seed))

    def _measure(self, at: Workplace, arm: Arm, seed: int) -> dict[str, Any]:
        """Means over held-out documents."""
        place = model_folder(at.folder, run_name("text", arm, seed), self.text.facts(arm, seed))
        model = load_model(place).eval()
        budget = self.text.budget
        text = code_text(
            budget.base.vocab_size, train_bytes=self.text.train_bytes, held_out_bytes=self.text.held_out_bytes
        )
        looks = [
            look(model, doc.token_ids[: budget.sequence_length]) for doc in text.held_out if len(doc.token_ids) > 64
        ]
        largest = [max(each.largest_activation) / each.typical_activation[-1] for each in looks]
        return {
            "first_token_mass": sum(each.first_token_mass for each in looks) / len(looks),
            "largest": max(max(each.largest_activation) for each in looks),
            "largest_over_typical": sum(largest) / len(largest),
        }

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        values: dict[str, Interval] = {}
        rows = []
        for gated, ungated in _GATES:
            for arm in (gated, ungated):
                numbers = {
                    key: _numbers(known, "look", arm, self.text.seeds, itemgetter(key))
                    for key in ("first_token_mass", "largest", "largest_over_typical")
                }
                losses = _numbers(known, "text", arm, self.text.seeds, _loss)
                rows.append([arm.name, *(_text(each, "{:.3g}") for each in numbers.values()), _text(losses, "{:.3f}")])
            for key in ("first_token_mass", "largest"):
                pair = [_numbers(known, "look", arm, self.text.seeds, itemgetter(key)) for arm in (gated, ungated)]
                values |= _quotient(f"{key}_{gated.name}", *pair)
        header = ["arm", "first-token mass", "largest activation", "largest over median", "bits per byte"]
        return Findings(
            "The models of C5 and the same without the output gate of attention, on held-out documents: what queries "
            "give to the first token on average, and the largest absolute value of the residual stream.",
            values,
            [Grid("Gate on and off: means of the seeds, with 95 %", header, rows)],
        )


@dataclass(frozen=True)
class MoreExperts:
    """C7: more experts of which each token uses as many, and what they are balanced over."""

    text: TextRuns

    def points(self, at: Workplace) -> Iterable[Point]:
        return self.text.points([*EXPERTS.values(), *_BALANCES], at.folder)

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        seeds = self.text.seeds
        losses = {count: _numbers(known, "text", arm, seeds, _loss) for count, arm in EXPERTS.items()}
        num_seeds = min(len(each) for each in losses.values())
        slopes = [_slope([(log2(count), each[seed]) for count, each in losses.items()]) for seed in range(num_seeds)]
        values = {"loss_of_a_doubling": mean_interval(slopes)} if slopes else {}
        balances = [_numbers(known, "text", arm, seeds, _loss) for arm in _BALANCES]
        values |= _difference("loss_step_minus_micro", *balances)
        evenness = _numbers(known, "text", HYBRID, seeds, lambda value: float(value["entropy"]))
        if evenness:
            values["load_entropy"] = mean_interval(evenness)
        rows = [self._row(known, arm) for arm in (*EXPERTS.values(), *_BALANCES)]
        header = [
            "arm",
            "parameters",
            "active",
            "bits per byte",
            "busiest over mean",
            "entropy of load",
            "dead experts",
        ]
        return Findings(
            "The hybrid of C5 with other numbers of experts, of which a token uses four; then the balance of a step of "
            "eight micro batches of 256 tokens against that of each micro batch.",
            values,
            [Grid("Equal operations: means of the seeds, with 95 %", header, rows)],
        )

    def _row(self, known: Mapping[str, Measured], arm: Arm) -> list[str]:
        config = arm.config(self.text.budget.base)
        name = "32 experts" if arm is HYBRID else arm.name
        numbers = [
            _text(_numbers(known, "text", arm, self.text.seeds, itemgetter(key)), form)
            for key, form in (
                ("bits_per_byte", "{:.3f}"),
                ("max_over_mean", "{:.2f}"),
                ("entropy", "{:.3f}"),
                ("dead", "{:.2f}"),
            )
        ]
        return [name, f"{count_parameters(config).total:,}", f"{count_active(config).without_head:,}", *numbers]


def _numbers(known: Mapping[str, Measured], kind: str, arm: Arm, seeds: int, of: Callable[[Any], float]) -> list[float]:
    return [of(value) for value in values_of(known, kind, arm, seeds)]


def _loss(value: Any) -> float:
    return float(value["bits_per_byte"])


def _mean(value: Any) -> float:
    return sum(value) / len(value)


def _difference(name: str, one: Sequence[float], other: Sequence[float]) -> dict[str, Interval]:
    """Of the seeds that both have."""
    pairs = [a - b for a, b in zip(one, other, strict=False)]
    return {name: mean_interval(pairs)} if pairs else {}


def _quotient(name: str, one: Sequence[float], other: Sequence[float]) -> dict[str, Interval]:
    pairs = [a / b for a, b in zip(one, other, strict=False)]
    return {name: mean_interval(pairs)} if pairs else {}


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line with the least squares."""
    x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _text(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    found = mean_interval(values)
    if len(values) < 2:
        return form.format(found.value)
    return f"{form.format(found.value)} ({form.format(found.low)} to {form.format(found.high)})"
