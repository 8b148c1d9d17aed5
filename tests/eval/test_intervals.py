"""Intervals: bounds that hold as often as they say, on draws of known distributions."""

from __future__ import annotations

import random

import numpy
import pytest

from qnext.eval.intervals import mean_interval, ratio_interval, wilson


@pytest.mark.parametrize(("share", "count"), [(0.5, 40), (0.9, 60), (0.02, 100)])
def test_wilson_covers(share: float, count: int) -> None:
    source = random.Random(0)
    draws = [sum(source.random() < share for _ in range(count)) for _ in range(2000)]
    covered = sum(wilson(hits, count).low <= share <= wilson(hits, count).high for hits in draws) / 2000
    assert 0.92 < covered < 0.99
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == 1 and wilson(0, 10).high > 0.2


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_a_mean_covers(count: int) -> None:
    source = numpy.random.default_rng(1)
    found = [mean_interval(row) for row in source.normal(3.0, 2.0, size=(2000, count)).tolist()]
    assert 0.93 < sum(each.low <= 3.0 <= each.high for each in found) / 2000 < 0.97


def test_the_quantiles_are_students() -> None:
    """Of [0, 1, 1, ...] the half width is t times a known deviation. Table: 12.706, 4.303, 3.182, 2.228, 2.042."""
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042)):
        values = [float(number) for number in range(freedom + 1)]
        found = mean_interval(values)
        error = numpy.std(values, ddof=1) / numpy.sqrt(len(values))
        assert (found.high - found.value) / error == pytest.approx(quantile, rel=0.01)


def test_a_ratio_weighs_by_size() -> None:
    found = ratio_interval([2.0, 30.0], [1.0, 10.0])
    assert found.value == 32 / 11 and found.low < found.value < found.high
    assert ratio_interval([3.0], [2.0]).value == 1.5
