"""What a problem of token ids is: its shape, its tokens, where its answers stand, and several as arrays.

Legend: N problems, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.errors import UsageError

IGNORED = -100  # a place where nothing is asked, as in torch's cross entropy
BEGIN, SET, ASK, SEPARATOR = range(4)  # what the first ids mean; content begins behind them
NUM_CONTROL = 4


@dataclass(frozen=True)
class IdShape:
    """How large a problem is. `num_facts` are the things to remember: pairs, needles, hops of a chain.

    `depth` is where the fact that is asked for first stands, from 0 (at the beginning) to 1; None: drawn.
    """

    vocab_size: int
    length: int  # tokens of the whole problem, the answers included
    num_facts: int = 4
    num_queries: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        if min(self.length, self.num_facts, self.num_queries) < 1:
            raise UsageError("length, facts and queries must be at least 1")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UsageError(f"depth {self.depth}: must be from 0 to 1")

    def need(self, tokens: int, what: str) -> None:
        if tokens > self.length:
            raise UsageError(f"{what}: {tokens} tokens are needed, more than the length of {self.length}")

    def part(self, index: int, count: int, *, least: int) -> range:
        """One of `count` equal ranges of content ids. Raises UsageError where it has fewer than `least` ids."""
        size = (self.vocab_size - NUM_CONTROL) // count
        if size < least:
            raise UsageError(f"{least * count + NUM_CONTROL} token ids are needed, more than {self.vocab_size}")
        return range(NUM_CONTROL + index * size, NUM_CONTROL + (index + 1) * size)


@dataclass(frozen=True)
class IdProblem:
    """Tokens with their answers among them. Each token at one of `answer_places` follows from those before it."""

    kind: str
    token_ids: tuple[int, ...]
    answer_places: tuple[int, ...]
    depth: float | None = None

    @property
    def answers(self) -> tuple[int, ...]:
        return tuple(self.token_ids[place] for place in self.answer_places)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the first answer."""
        return self.token_ids[: self.answer_places[0]]


class IdBatch(NamedTuple):
    """Problems of one length as arrays. `answer_ids_NT` has at each place the answer that must follow it, else IGNORED:
    the targets of a cross entropy of the logits at the same places."""

    token_ids_NT: NDArray[np.int64]
    answer_ids_NT: NDArray[np.int64]


def batch_of(problems: Sequence[IdProblem]) -> IdBatch:
    """Of problems of one length."""
    token_ids_NT = np.array([problem.token_ids for problem in problems], dtype=np.int64)
    answer_ids_NT = np.full_like(token_ids_NT, IGNORED)
    for row, problem in enumerate(problems):
        places = np.array(problem.answer_places)
        answer_ids_NT[row, places - 1] = token_ids_NT[row, places]
    return IdBatch(token_ids_NT, answer_ids_NT)


class Draft:
    """A problem that grows: tokens, some of which are answers."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._places: list[int] = []

    def add(self, *token_ids: int) -> None:
        self.token_ids += token_ids

    def answer(self, *token_ids: int) -> None:
        self._places += range(len(self.token_ids), len(self.token_ids) + len(token_ids))
        self.token_ids += token_ids

    def finish(self, kind: str, shape: IdShape, depth: float | None = None) -> IdProblem:
        """BEGIN stands as often before it as the length leaves room."""
        room = shape.length - len(self.token_ids)
        assert room >= 0 and self._places
        places = tuple(place + room for place in self._places)
        return IdProblem(kind, (BEGIN,) * room + tuple(self.token_ids), places, depth)
