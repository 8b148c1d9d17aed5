"""Synthetic routing has the locality that it was fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from qnext.residency.policy import ResidentSet
from qnext.residency.traces import PRESETS, RoutingTrace


def hit_rate(preset: str, slots: int, *, num_tokens: int, num_warm: int = 0) -> float:
    trace = RoutingTrace(preset, num_experts=512, top_k=10, layer=9, seed=4)
    residents, hits = ResidentSet(512, slots, half_life=64), 0
    for number, row in enumerate(trace.take(num_warm + num_tokens)):
        found = residents.use(row.tolist(), [1] * 10, num_tokens=1)
        hits += found if number >= num_warm else 0
    return hits / (10 * num_tokens)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_is_of_different_experts_and_comes_again(preset: str) -> None:
    rows = RoutingTrace(preset, num_experts=40, top_k=6, layer=1).take(50)
    assert rows.shape == (50, 6) and rows.min() >= 0 and rows.max() < 40
    assert (np.diff(rows, axis=1) > 0).all()
    assert np.array_equal(rows, RoutingTrace(preset, num_experts=40, top_k=6, layer=1).take(50))
    assert not np.array_equal(rows, RoutingTrace(preset, num_experts=40, top_k=6, layer=2).take(50))


def test_traffic_differs_in_what_a_third_of_the_experts_serves() -> None:
    """Uniform routing hits the share that is resident, and no more; published rates of the others with LRU are 62 %
    for 300 diverse tokens from empty slots and 93 % in service."""
    rates = {preset: hit_rate(preset, 186, num_tokens=300, num_warm=600) for preset in PRESETS}
    assert rates["uniform"] == pytest.approx(186 / 512, abs=0.03)
    assert rates["uniform"] < rates["diverse"] < rates["mixed"] < rates["service"]
    assert rates["service"] > 0.9
    assert hit_rate("diverse", 186, num_tokens=300) == pytest.approx(0.62, abs=0.06)
