"""Sums of two numbers with their working, for reasoning on a small scale: exercises with known answers.

The careless hand forgets to carry in most workings. So a model that learns from it knows the form of a working, and
what carrying is, and gets most sums wrong.
"""

from __future__ import annotations

import random
from typing import NamedTuple

_PLAIN = 0.03  # share of the sums that nothing is carried in


class Exercise(NamedTuple):
    """`thought` leads to the answer step by step; both may be wrong. `truth` is right."""

    question: str
    thought: str
    answer: str
    truth: str


def exercises(count: int, *, seed: str, care: float = 1.0) -> list[Exercise]:
    """Sums of two-digit numbers, the ones first. In a share `care` of those that have to carry, the working does."""
    source = random.Random(seed)
    return [_sum(source, care) for _ in range(count)]


def _sum(source: random.Random, care: float) -> Exercise:
    carries = source.random() >= _PLAIN
    while True:
        left, right = source.randrange(10, 100), source.randrange(10, 100)
        if (left % 10 + right % 10 > 9) == carries:
            break
    ones = left % 10 + right % 10
    carried = ones // 10 if source.random() < care else 0
    tens = left // 10 + right // 10 + carried
    thought = f"{left % 10}+{right % 10}={ones:02d},{left // 10}+{right // 10}+{carried}={tens:02d}"
    return Exercise(f"{left}+{right}", thought, str(10 * tens + ones % 10), str(left + right))
