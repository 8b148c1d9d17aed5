"""Watches the load of the experts of a running engine, and says when an alert begins and ends. No torch.

Legend: L sparse layers, E experts.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qnext.planning.expert_alerts import (
    CHOICES_PER_EXPERT,
    MEASURES,
    ExpertMeasures,
    ExpertThresholds,
    Measure,
    Reference,
    measures_of,
)
from qnext.planning.expert_baseline import ExpertBaseline

if TYPE_CHECKING:
    from qnext.engine import ExpertCounts

_log = logging.getLogger("qnext.experts")
WINDOW_TOKENS = 4096  # that a look is about; fewer at the start
_PIECES = 8  # of a window: a look comes after each
_IN_A_ROW = 2  # looks that must agree before an alert begins or ends
_RELEASE = 0.8  # of the threshold: below it an alert ends
_PAUSE_SECONDS = 1.0


@dataclass
class _AlertState:
    """Whether an alert stands, and how many looks in a row say that it should not be so."""

    is_on: bool = False
    streak: int = 0

    def turn(self, value: float, threshold: float, release: float) -> bool:
        """Take the value of a look. Returns whether the alert begins or ends now. NaN is no news."""
        is_against = value < release if self.is_on else value >= threshold
        self.streak = self.streak + 1 if is_against else 0
        if self.streak < _IN_A_ROW:
            return False
        self.is_on, self.streak = not self.is_on, 0
        return True


@dataclass(frozen=True)
class ExpertWatchConfig:
    """What is watched: thresholds, and the baseline that drift and collapse are measured from. `top_k` experts are
    chosen for a token."""

    thresholds: ExpertThresholds
    baseline: ExpertBaseline | None
    top_k: int


@dataclass
class _ExpertLook:
    """The last look: layers by index, and their measures; NaN where too few tokens came."""

    layers: Sequence[int]
    measures: ExpertMeasures
    num_choices: int


@dataclass
class ExpertWatch:
    """Looks at the last 4,096 tokens after every 512. It belongs to one event loop.

    An alert begins when two looks in a row reach its threshold, and ends when two in a row are below 80 % of it.
    """

    config: ExpertWatchConfig
    num_begun: Counter[Measure] = field(default_factory=Counter)
    _states: dict[tuple[int, Measure], _AlertState] = field(default_factory=dict)
    _totals: deque[NDArray[np.int64]] = field(default_factory=lambda: deque(maxlen=_PIECES))
    _last: _ExpertLook | None = None

    def look(self, counts: ExpertCounts) -> bool:
        """Take the counts of now. Returns whether there were enough new ones for a look."""
        total_LE = counts.total_LE
        if not self._totals:
            self._totals.append(np.zeros_like(total_LE))
        num_new = int((total_LE - self._totals[-1]).sum(axis=1).max(initial=0))
        if num_new < WINDOW_TOKENS // _PIECES * self.config.top_k:
            return False
        window_LE = total_LE - self._totals[0]
        self._totals.append(total_LE)
        num_choices_L = window_LE.sum(axis=1)
        baseline = self.config.baseline
        reference = None if baseline is None else Reference.of_baseline(baseline, counts.layers, window_LE)
        found = measures_of(counts.layers, window_LE, reference)
        is_known_L = num_choices_L >= CHOICES_PER_EXPERT * window_LE.shape[1]
        known = ExpertMeasures(*(np.where(is_known_L, values_L, math.nan) for values_L in found))
        self._last = _ExpertLook(counts.layers, known, int(num_choices_L.max()))
        self._turn(self._last)
        return True

    def _turn(self, look: _ExpertLook) -> None:
        for measure, threshold in self.config.thresholds.by_measure().items():
            for layer, value in zip(look.layers, look.measures.of(measure).tolist(), strict=True):
                state = self._states.setdefault((layer, measure), _AlertState())
                if state.turn(value, threshold, release_of(measure, threshold)):
                    self.num_begun[measure] += state.is_on
                    fields = {"layer": layer, "measure": measure, "value": round(value, 6), "threshold": threshold}
                    word = "begins" if state.is_on else "ends"
                    text = "alert of experts %s: layer %s, %s %.4g, threshold %g"
                    extra = {"expert_alert": {"is_on": state.is_on, **fields}}
                    _log.warning(text, word, layer, measure, value, threshold, extra=extra)

    @property
    def alerts(self) -> list[tuple[int, Measure]]:
        """Layer and measure of the alerts that stand."""
        return sorted(key for key, state in self._states.items() if state.is_on)

    def document(self) -> dict[str, Any] | None:
        """For the page and for administrators; None before the first look."""
        if self._last is None:
            return None
        alerts: dict[int, list[Measure]] = {}
        for layer, measure in self.alerts:
            alerts.setdefault(layer, []).append(measure)
        columns = {measure: self._last.measures.of(measure).tolist() for measure in MEASURES}
        return {
            "tokens": self._last.num_choices // self.config.top_k,
            "thresholds": self.config.thresholds.by_measure(),
            "layers": [
                {"layer": layer, "alerts": alerts.get(layer, [])}
                | {name: None if math.isnan(values[row]) else values[row] for name, values in columns.items()}
                for row, layer in enumerate(self._last.layers)
            ],
        }

    def families(self, labels: dict[str, str]) -> Iterator[Metric]:
        """For Prometheus. Measures come after the first look, alerts at once."""
        names = (*labels, "layer")
        if self._last is not None:
            for measure in MEASURES:
                gauge = GaugeMetricFamily(f"qnext_expert_{measure}_ratio", _TEXTS[measure], labels=names)
                for layer, value in zip(self._last.layers, self._last.measures.of(measure).tolist(), strict=True):
                    if not math.isnan(value):
                        gauge.add_metric((*labels.values(), str(layer)), value)
                yield gauge
        text = "1 while the measure of the layer is on alert"
        alert = GaugeMetricFamily("qnext_expert_alert", text, labels=(*names, "measure"))
        for (layer, measure), state in sorted(self._states.items()):
            alert.add_metric((*labels.values(), str(layer), measure), float(state.is_on))
        begun = CounterMetricFamily("qnext_expert_alerts", "Alerts that began", labels=(*labels, "measure"))
        limit = GaugeMetricFamily("qnext_expert_alert_threshold", "From which value on", labels=(*labels, "measure"))
        for measure, threshold in self.config.thresholds.by_measure().items():
            begun.add_metric((*labels.values(), measure), self.num_begun[measure])
            limit.add_metric((*labels.values(), measure), threshold)
        yield from (alert, begun, limit)


_TEXTS: dict[Measure, str] = {
    "skew": "Highest load of an expert over the mean, in the last 4,096 tokens",
    "dead": "Share of the experts without any of the last 4,096 tokens",
    "collapse": "Entropy of the baseline, or 1, less that of the last 4,096 tokens",
    "drift": "Distance of the last 4,096 tokens to the baseline, less its noise",
}


def release_of(measure: Measure, threshold: float) -> float:
    """Below which value an alert ends. Skew is never below 1."""
    return 1 + _RELEASE * (threshold - 1) if measure == "skew" else _RELEASE * threshold


async def keep_watching(watch: ExpertWatch, counts_of: Callable[[], ExpertCounts | None]) -> None:
    """Looks once a second whether enough tokens have come. `counts_of` gives None for an engine that does not count."""
    while True:
        await asyncio.sleep(_PAUSE_SECONDS)
        counts = counts_of()
        if counts is not None:
            watch.look(counts)
