"""Token ids whose answers need a state that every token changes: parity, permutations, and long sums.

Between the tokens `num_queries` questions ask for the state so far, evenly spread, the last one at the end. A fixed
number of attention layers cannot follow S5 at every length, unless TC0 = NC1 (Merrill and others 2024,
arXiv:2404.08819).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import permutations

from qnext.eval.ids.problem import ASK, SEPARATOR, SET, Draft, IdProblem, IdShape

_BASE = 10


def parity(source: random.Random, shape: IdShape) -> IdProblem:
    """Zeros and ones; asked is the parity of the ones so far."""
    return _tracked("parity", source, shape, range(2), lambda state, step: state ^ step)


def s3(source: random.Random, shape: IdShape) -> IdProblem:
    """Permutations of three things; asked is their product so far."""
    return _of_permutations("s3", source, shape, 3)


def s5(source: random.Random, shape: IdShape) -> IdProblem:
    """Permutations of five things, 120 tokens; asked is their product so far."""
    return _of_permutations("s5", source, shape, 5)


def addition(source: random.Random, shape: IdShape) -> IdProblem:
    """Two numbers of as many digits as the length has room for, and their sum, the highest digit first."""
    shape.need(6, "a sum")
    digits = shape.part(0, 1, least=_BASE)
    count = (shape.length - 3) // 3
    left, right = (source.randrange(_BASE**count) for _ in range(2))
    draft = Draft()
    draft.add(*_digits(digits, left, count), SET, *_digits(digits, right, count), SEPARATOR)
    draft.answer(*_digits(digits, left + right, count + 1))
    return draft.finish("addition", shape)


def _digits(digits: range, number: int, count: int) -> list[int]:
    return [digits[int(digit)] for digit in f"{number:0{count}d}"]


def _of_permutations(kind: str, source: random.Random, shape: IdShape, size: int) -> IdProblem:
    elements = list(permutations(range(size)))
    number = {element: index for index, element in enumerate(elements)}

    def product(state: int, step: int) -> int:
        return number[tuple(elements[step][place] for place in elements[state])]

    return _tracked(kind, source, shape, range(len(elements)), product)


def _tracked(
    kind: str, source: random.Random, shape: IdShape, steps: Sequence[int], apply: Callable[[int, int], int]
) -> IdProblem:
    """The state before the first token is 0, and so is the step that changes nothing."""
    num_steps = shape.length - 2 * shape.num_queries
    shape.need(3 * shape.num_queries, f"{shape.num_queries} questions for a state")
    content = shape.part(0, 1, least=len(steps))
    asks = {num_steps * (number + 1) // shape.num_queries for number in range(shape.num_queries)}
    draft, state = Draft(), 0
    for count in range(1, num_steps + 1):
        step = source.choice(steps)
        state = apply(state, step)
        draft.add(content[step])
        if count in asks:
            draft.add(ASK)
            draft.answer(content[state])
    return draft.finish(kind, shape)
