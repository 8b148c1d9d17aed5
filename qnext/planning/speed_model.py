"""Seconds of steps from what they do: fitted to a machine's own measurements, or from published peaks. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qnext.planning.step_load import StepLoad

# What decides how fast weights are multiplied: the width of their numbers.
PRECISIONS = ("fp32", "bf16", "int8", "int4")
_USUAL_ERROR = 0.1
_ROUNDS = 20


class SpeedModel(NamedTuple):
    """Seconds for each unit of a load, in decoding and in prompts. Where a machine `overlaps`, its layers cost what
    they cost, and of reading and computing the longer one counts; otherwise everything adds up."""

    decode: StepLoad
    prefill: StepLoad
    overlaps: bool = False

    def decode_seconds(self, load: StepLoad) -> float:
        return self._seconds(load, self.decode)

    def prefill_seconds(self, load: StepLoad) -> float:
        return self._seconds(load, self.prefill)

    def _seconds(self, load: StepLoad, units: StepLoad) -> float:
        times = StepLoad(*(count * unit for count, unit in zip(load, units, strict=True)))
        if not self.overlaps:
            return sum(times)
        started = times.steps + times.linear_layers + times.full_layers + times.expert_calls
        return started + max(times.num_bytes, times.operations)


def from_peaks(*, bandwidth: float, operations: float, share: float, layer_seconds: float) -> SpeedModel:
    """A machine that reads at its `bandwidth`, computes at a `share` of its peak, and needs time to start a layer."""
    units = StepLoad(
        steps=0.0,
        linear_layers=layer_seconds,
        full_layers=layer_seconds,
        weight_bytes=1 / bandwidth,
        matrix_operations=1 / (share * operations),
        row_numbers=0.0,
        attention_operations=1 / (share * operations),
        kv_bytes=1 / bandwidth,
        delta_operations=1 / (share * operations),
        state_bytes=1 / bandwidth,
        expert_calls=0.0,
        cold_bytes=0.0,
        cold_kv_bytes=0.0,
    )
    return SpeedModel(units, units, overlaps=True)


def fit_units(loads: Sequence[StepLoad], seconds: Sequence[float], *, used: Sequence[str]) -> StepLoad:
    """Seconds for each of the units `used`, none of them negative, whose relative errors are least; zero for all other
    units. Errors beyond `_USUAL_ERROR` count as if they were linear: a few disturbed measurements do not decide."""
    columns = [StepLoad._fields.index(name) for name in used]
    matrix = np.array([[load[column] for column in columns] for load in loads]) / np.array(seconds)[:, None]
    scale = matrix.max(axis=0, initial=0.0)
    scale[scale == 0] = 1.0
    weights = np.ones(len(loads))
    for _ in range(_ROUNDS):
        found = _non_negative(matrix / scale * weights[:, None], weights) / scale
        wrong = np.abs(matrix @ found - 1)
        weights = np.sqrt(np.minimum(1.0, _USUAL_ERROR / np.maximum(wrong, 1e-9)))
    values: Mapping[str, float] = {name: float(value) for name, value in zip(used, found, strict=True)}
    return StepLoad(**{name: values.get(name, 0.0) for name in StepLoad._fields})


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative numbers (Lawson and Hanson)."""
    num = matrix.shape[1]
    is_free = np.zeros(num, dtype=bool)
    found = np.zeros(num)
    for _ in range(10 * num):
        gradient = matrix.T @ (wanted - matrix @ found)
        candidates = np.where(is_free, -np.inf, gradient)
        best = int(candidates.argmax())
        if candidates[best] <= 1e-10:
            break
        is_free[best] = True
        while True:
            trial = np.zeros(num)
            trial[is_free] = np.linalg.lstsq(matrix[:, is_free], wanted, rcond=None)[0]
            if (trial[is_free] > 0).all():
                found = trial
                break
            falling = is_free & (trial <= 0)
            step = (found[falling] / (found[falling] - trial[falling])).min()
            found = found + step * (trial - found)
            is_free &= found > 1e-14
            found[~is_free] = 0.0
    return found
