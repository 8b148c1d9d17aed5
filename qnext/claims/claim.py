"""What a claim is, what an experiment finds, and how the one is judged by the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from qnext.claims.notebook import Measured, Point
from qnext.diagnostics.charts import Chart
from qnext.eval.intervals import Interval

Judgement = Literal["shown", "not shown", "open", "not measured"]


class Limit(NamedTuple):
    """A number is at least `low` and at most `high`, where they are given."""

    low: float | None = None
    high: float | None = None

    def judge(self, found: Interval | None) -> Judgement:
        """Open where the interval reaches over a limit: this many seeds or rounds do not decide."""
        if found is None:
            return "not measured"
        low, high = (found.low, found.high) if found.low == found.low else (found.value, found.value)
        is_above = self.low is None or low >= self.low
        is_below = self.high is None or high <= self.high
        if is_above and is_below:
            return "shown"
        is_outside = (self.low is not None and high < self.low) or (self.high is not None and low > self.high)
        return "not shown" if is_outside else "open"

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{_digits(self.low)} to {_digits(self.high)}"
        return f"at least {_digits(self.low)}" if self.low is not None else f"at most {_digits(self.high)}"


class Grid(NamedTuple):
    """A table of a report; cells are what people read."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def ratio_cell(ratio: Interval) -> str:
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


class Picture(NamedTuple):
    """Charts of a report, side by side. `name` is that of its file."""

    name: str
    title: str
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Findings:
    """What an experiment found. `values` are the numbers by which claims are judged, by field."""

    setting: str  # what was run, on which shapes
    values: Mapping[str, Interval] = field(default_factory=dict)
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


class Workplace(NamedTuple):
    """Where experiments keep what is larger than a number, such as trained models, and llama.cpp's llama-bench."""

    folder: Path
    llama_bench: str | None = None


class Experiment(Protocol):
    """Points to be measured, and what they mean together. What was not measured yet is left out of the findings."""

    def points(self, at: Workplace) -> Iterable[Point]: ...

    def findings(self, known: Mapping[str, Measured]) -> Findings: ...


@dataclass(frozen=True)
class Script:
    """An experiment in a form of seconds and in its own. `prediction` was written before it was first run."""

    number: str  # C1 to C10
    title: str
    prediction: str
    reach: str  # how far the result carries
    short: Experiment
    long: Experiment


@dataclass(frozen=True)
class Claim:
    """What was published, and the number here that decides whether it shows."""

    sentence: str
    source: str
    script: Script
    field: str  # of Findings.values
    bound: Limit
    published: str

    def judged(self, values: Mapping[str, Interval]) -> dict[str, Any]:
        """For programs."""
        found = values.get(self.field)
        return {
            "claim": self.sentence,
            "source": self.source,
            "published": self.published,
            "field": self.field,
            "bound": str(self.bound),
            "found": None if found is None else interval_document(found),
            "judgement": self.bound.judge(found),
        }


def exactly(value: float) -> Interval:
    """A number that was counted or computed."""
    return Interval(value, value, value)


def interval_document(found: Interval) -> dict[str, float | None]:
    """For programs: JSON has no infinity, so bounds that one run cannot give are null."""
    low, high = (bound if math.isfinite(bound) else None for bound in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high}


def _digits(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
