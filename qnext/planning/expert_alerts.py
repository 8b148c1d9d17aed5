"""When the load of experts is a reason to look: four measures of a layer, and thresholds for them.

Legend: L sparse layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from qnext.errors import UsageError
from qnext.planning.expert_baseline import ExpertBaseline
from qnext.planning.expert_shape import expert_shape

Measure = Literal["skew", "dead", "collapse", "drift"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
CHOICES_PER_EXPERT = 20  # fewer say nothing of an expert


class ExpertMeasures(NamedTuple):
    """float64 [L] each. `skew_L` is the highest load over the mean one, 1 where all are equal. `dead_L` is the share of
    experts without a token. `collapse_L` is what the entropy, over its largest value, is below that of the reference,
    or below 1 without one. `drift_L` is the distance to the reference less its noise, NaN without one."""

    skew_L: NDArray[np.float64]
    dead_L: NDArray[np.float64]
    collapse_L: NDArray[np.float64]
    drift_L: NDArray[np.float64]

    def of(self, measure: Measure) -> NDArray[np.float64]:
        found: NDArray[np.float64] = getattr(self, f"{measure}_L")
        return found


class Reference(NamedTuple):
    """What a load is compared with: entropy and drift by the index of the layer; others have none."""

    entropy: Mapping[int, float]
    drift: Mapping[int, float]

    @classmethod
    def of_baseline(cls, baseline: ExpertBaseline, layers: Sequence[int], counts_LE: NDArray[np.int64]) -> Reference:
        rows = [list(layers).index(layer) for layer in baseline.layers]
        found = baseline.distances(counts_LE[rows])
        drift_L = np.maximum(found.distance_L - found.noise_L, 0.0)
        return cls(
            dict(zip(baseline.layers, baseline.entropy_L.tolist(), strict=True)),
            dict(zip(baseline.layers, drift_L.tolist(), strict=True)),
        )


def measures_of(
    layers: Sequence[int], counts_LE: NDArray[np.int64], reference: Reference | None = None
) -> ExpertMeasures:
    """Of the tokens of each expert of the layers with these indices."""
    entropy, drift = ({}, {}) if reference is None else reference
    shape = expert_shape(counts_LE)
    return ExpertMeasures(
        skew_L=1 / shape.balance_L,
        dead_L=shape.num_dead_L / counts_LE.shape[1],
        collapse_L=np.array([entropy.get(layer, 1.0) for layer in layers]) - shape.entropy_L,
        drift_L=np.array([drift.get(layer, math.nan) for layer in layers]),
    )


@dataclass(frozen=True)
class ExpertThresholds:
    """From which value on a measure is an alert; None: never."""

    skew: float | None = None
    dead: float | None = None
    collapse: float | None = None
    drift: float | None = None

    @classmethod
    def parse(cls, text: str) -> ExpertThresholds:
        """From "skew=8,drift=0.1". Raises UsageError naming what is wrong.

        >>> ExpertThresholds.parse("skew=8,drift=0.1").by_measure()
        {'skew': 8.0, 'drift': 0.1}
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (each.strip() for each in part.partition("="))
            if name not in MEASURES or name in found:
                raise UsageError(f"alerts: {part!r}: must be one of {', '.join(MEASURES)}, once each, such as skew=8")
            try:
                found[name] = float(value)
            except ValueError:
                raise UsageError(f"alerts: {part!r}: no number after the =") from None
            lowest, highest = (1.0, math.inf) if name == "skew" else (0.0, 1.0)
            if not lowest < found[name] <= highest or math.isinf(found[name]):
                limits = "above 1" if name == "skew" else "above 0 and at most 1"
                raise UsageError(f"alerts: {part!r}: must be {limits}")
        return cls(**found)

    def by_measure(self) -> dict[Measure, float]:
        """The thresholds that there are."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}

    @property
    def needs_reference(self) -> bool:
        return self.drift is not None


class ExpertAlert(NamedTuple):
    """A measure of a layer that has reached its threshold."""

    layer: int
    measure: Measure
    value: float
    threshold: float

    @property
    def line(self) -> str:
        return f"layer {self.layer}: {self.measure} is {self.value:.3g}, from {self.threshold:.3g} on an alert"


def alerts_of(layers: Sequence[int], measures: ExpertMeasures, thresholds: ExpertThresholds) -> list[ExpertAlert]:
    """Layer by layer, in the order of the measures."""
    return [
        ExpertAlert(layer, measure, float(measures.of(measure)[row]), threshold)
        for row, layer in enumerate(layers)
        for measure, threshold in thresholds.by_measure().items()
        if measures.of(measure)[row] >= threshold
    ]


def tokens_needed(num_experts: int, top_k: int) -> int:
    """How many tokens a load must have before it says something of each expert."""
    return math.ceil(CHOICES_PER_EXPERT * num_experts / top_k)
