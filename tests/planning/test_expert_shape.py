"""Entropy, balance, top share and dead experts of counts that can be reckoned by hand."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from qnext.planning import expert_shape
from qnext.planning.expert_shape import expert_shape as shape_of


def test_known_layers() -> None:
    found = shape_of(np.array([[4, 4, 4, 4], [0, 16, 0, 0], [6, 2, 0, 0]]))
    assert found.entropy_L.tolist() == pytest.approx([1.0, 0.0, 0.811278124459 / 2.0])
    assert found.balance_L.tolist() == pytest.approx([1.0, 1 / 4, 1 / 3])
    assert found.top_share_L.tolist() == [0.25, 1.0, 0.75]
    assert found.num_dead_L.tolist() == [0, 3, 2]
    assert not np.signbit(found.entropy_L).any()


def test_the_busiest_hundredth_is_rounded_up() -> None:
    counts = np.array([[50, 30, *([1] * 120), *([0] * 28)]])
    found = shape_of(counts)
    shares = counts[counts > 0] / 200
    assert found.top_share_L.tolist() == [80 / 200]
    assert found.entropy_L[0] == pytest.approx(-(shares * np.log(shares)).sum() / math.log(150))


@pytest.mark.parametrize(("counts", "top_share"), [([[0, 0, 0]], 1 / 3), ([[0]], 1.0), ([[5]], 1.0)])
def test_no_token_and_one_expert_are_balanced(counts: list[list[int]], top_share: float) -> None:
    found = shape_of(np.array(counts))
    assert (found.entropy_L[0], found.balance_L[0], found.top_share_L[0]) == (1.0, 1.0, top_share)


def test_examples() -> None:
    assert doctest.testmod(expert_shape) == (0, 1)
