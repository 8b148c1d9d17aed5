"""Steps whose loss or gradient lies far above those before: they are told, and the loop does not apply them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

_WINDOW = 201  # steps
_FEWEST = 32  # in the window before a step is judged
_MOST_IN_A_ROW = 3
_OF_NORMAL = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation
_LOSS_FLOOR, _NORM_FLOOR = 0.02, 0.1  # the smallest deviations: of the median loss, and of the norm's logarithm


class SpikeGuard:
    """Compares every step with the median of the last 201, which spikes hardly move.

    A spike is a step whose loss, or the logarithm of whose gradient norm, lies more than `threshold` deviations above
    the median; a deviation is 1.4826 times the median absolute one. The first 32 steps are not judged. Three spikes in
    a row are no spike but a new level: the next step is applied, and the window begins anew. So it does when a loss
    joins the others, as MTP does late in a run. `threshold` 0 judges nothing.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.num_spikes = 0
        self._in_a_row = 0
        self._names: list[str] = []
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, losses: Mapping[str, float], *, grad_norm: float) -> str | None:
        """What of a step with a finite gradient is a spike, "loss" (`main` of them) or "gradient norm"; None where
        nothing is."""
        if not self.threshold:
            return None
        if self._names != list(losses):
            self._begin_anew()
        self._names, loss = list(losses), losses["main"]
        log_norm = math.log(max(grad_norm, 1e-30))
        found = None
        if len(self._losses) >= _FEWEST:
            if self._is_far_above(self._losses, loss, floor=_LOSS_FLOOR * abs(median(self._losses))):
                found = "loss"
            elif self._is_far_above(self._norms, log_norm, floor=_NORM_FLOOR):
                found = "gradient norm"
        if found is not None and self._in_a_row == _MOST_IN_A_ROW:
            found = None
            self._begin_anew()
        self._in_a_row = 0 if found is None else self._in_a_row + 1
        self.num_spikes += found is not None
        self._losses.append(loss)
        self._norms.append(log_norm)
        return found

    def _begin_anew(self) -> None:
        self._losses.clear()
        self._norms.clear()

    def _is_far_above(self, window: deque[float], value: float, *, floor: float) -> bool:
        middle = median(window)
        deviation = max(floor, _OF_NORMAL * median(abs(each - middle) for each in window))
        return not value <= middle + self.threshold * deviation  # a loss may be NaN where no gradient is

    @property
    def state(self) -> dict[str, Any]:
        """For a snapshot."""
        return {
            "names": self._names,
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "num_spikes": self.num_spikes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._names = list(state["names"])
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._in_a_row, self.num_spikes = state["in_a_row"], state["num_spikes"]
