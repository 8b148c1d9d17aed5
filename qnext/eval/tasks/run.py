"""Asks a model the problems of a suite: by task, length and depth, each cell with its interval."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qnext.errors import UsageError
from qnext.eval.intervals import Interval, wilson
from qnext.eval.tasks.problem import NO_FRAME, ChatFrame, Examinee, TaskShape, WordProblem
from qnext.eval.tasks.suite import WITH_DEPTH, TaskWriter, check_tasks

OnCell = Callable[["CellScore"], object]


@dataclass(frozen=True)
class SuitePlan:
    """What is asked. `ranks_alternatives` also finds how likely the right answer is among wrong ones, which tells
    something about models that are too weak to write it."""

    kinds: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10  # of a cell
    num_facts: int = 4
    num_queries: int = 2
    seed: int = 0
    is_chat: bool = False
    answer_tokens: int = 8  # beside those of the answer itself
    ranks_alternatives: bool = False
    filler: str = ""  # a text to hide facts in; "": sentences are made

    def __post_init__(self) -> None:
        check_tasks(self.kinds)
        if not (self.kinds and self.lengths and self.depths) or self.samples < 1:
            raise UsageError("tasks, lengths, depths and samples must be at least one each")

    def cells(self) -> Iterator[tuple[str, TaskShape]]:
        for kind, length in itertools.product(self.kinds, self.lengths):
            for depth in self.depths if kind in WITH_DEPTH else (None,):
                yield kind, TaskShape(length, self.num_facts, self.num_queries, depth)

    @property
    def num_problems(self) -> int:
        return sum(1 for _ in self.cells()) * self.samples


@dataclass(frozen=True)
class CellScore:
    """The problems of one task, length and depth. `exact`: the greedy answer is right. `ranked`: the right answer is
    the likeliest of the alternatives, one in `num_alternatives` by chance."""

    kind: str
    length: int
    depth: float | None
    num_problems: int
    exact: Interval
    ranked: Interval | None
    num_alternatives: int
    seconds: float  # of a problem, prefill and answer
    examples: tuple[tuple[str, str], ...]  # what was expected and what came, of the first that were wrong


@dataclass(frozen=True)
class SuiteReport:
    """All cells, and all problems of a task together."""

    cells: tuple[CellScore, ...]

    def of(self, kind: str) -> tuple[CellScore, ...]:
        return tuple(cell for cell in self.cells if cell.kind == kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.kind for cell in self.cells))

    def total(self, kind: str) -> Interval:
        cells = self.of(kind)
        return wilson(sum(cell.exact.value * cell.num_problems for cell in cells), sum(c.num_problems for c in cells))

    def table(self) -> str:
        """For people: a task's depths down and lengths across, and all of it with its interval."""
        lines: list[str] = []
        for kind in self.kinds:
            cells = {(cell.depth, cell.length): cell for cell in self.of(kind)}
            lengths = sorted({length for _, length in cells})
            lines += ["", f"{kind}   {self.total(kind).percent()} exact", _row("depth", map(_short, lengths))]
            for depth in sorted({depth for depth, _ in cells}, key=lambda each: -1.0 if each is None else each):
                shares = (f"{cells[depth, length].exact.value:.0%}" for length in lengths)
                lines.append(_row("drawn" if depth is None else f"{depth:.0%}", shares))
            ranked = [cell for cell in self.of(kind) if cell.ranked is not None]
            if ranked:
                share = sum(cell.ranked.value for cell in ranked if cell.ranked) / len(ranked)
                chance = 1 / ranked[0].num_alternatives
                lines.append(f"likeliest of {ranked[0].num_alternatives}: {share:.1%} (chance {chance:.1%})")
        return "\n".join(lines[1:])

    def to_json(self) -> dict[str, Any]:
        return {
            "cells": [asdict(cell) for cell in self.cells],
            "totals": {kind: self.total(kind)._asdict() for kind in self.kinds},
        }


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:>7}" + "".join(f"{cell:>8}" for cell in cells)


def _short(length: int) -> str:
    """
    >>> _short(512), _short(32768), _short(1010000)
    ('512', '32K', '1010000')
    """
    return f"{length // 1024}K" if length % 1024 == 0 and length else str(length)


def run_suite(examinee: Examinee, plan: SuitePlan, *, on_cell: OnCell = lambda cell: None) -> SuiteReport:
    """Raises UsageError before anything is asked where a length is beyond the model's context."""
    if max(plan.lengths) > examinee.max_length:
        raise UsageError(f"a length of {max(plan.lengths)} is beyond the model's {examinee.max_length} tokens")
    writer = TaskWriter.of(
        examinee.encode,
        frame=ChatFrame.of(examinee.encode_chat) if plan.is_chat else NO_FRAME,
        answer_tokens=plan.answer_tokens,
        text=plan.filler,
    )
    cells = []
    for kind, shape in plan.cells():
        problems = [writer.problem(kind, shape, sample=sample, seed=plan.seed) for sample in range(plan.samples)]
        cell = _cell(examinee, problems, ranks=plan.ranks_alternatives)
        on_cell(cell)
        cells.append(cell)
    return SuiteReport(tuple(cells))


def _cell(examinee: Examinee, problems: Sequence[WordProblem], *, ranks: bool) -> CellScore:
    begun = time.perf_counter()
    most = max(problem.max_tokens for problem in problems)
    answers = examinee.complete([problem.prompt_ids for problem in problems], max_tokens=most)
    seconds = time.perf_counter() - begun
    wrong = [
        (problem.expected.text, answer)
        for problem, answer in zip(problems, answers, strict=True)
        if not problem.expected.is_answered_by(answer)
    ]
    first = problems[0]
    num_alternatives = 1 + min(len(problem.expected.alternatives) for problem in problems)
    return CellScore(
        kind=first.kind,
        length=first.shape.length,
        depth=first.shape.depth,
        num_problems=len(problems),
        exact=wilson(len(problems) - len(wrong), len(problems)),
        ranked=wilson(_num_ranked(examinee, problems), len(problems)) if ranks else None,
        num_alternatives=num_alternatives,
        seconds=seconds / len(problems),
        examples=tuple(wrong[:2]),
    )


def _num_ranked(examinee: Examinee, problems: Sequence[WordProblem]) -> int:
    """Of how many the right answer is likelier than each other one, by token where they differ in length."""
    found = 0
    for problem in problems:
        texts = [problem.expected.text, *problem.expected.alternatives]
        endings = [examinee.encode(f" {text}") for text in texts]
        values = examinee.log_likelihoods([(problem.prompt_ids, ending) for ending in endings])
        means = [value / len(ending) for value, ending in zip(values, endings, strict=True)]
        found += means[0] > max(means[1:], default=float("-inf"))
    return found
