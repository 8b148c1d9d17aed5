"""What was measured is kept point by point, and nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qnext.claims.notebook import Notebook, Point
from qnext.errors import CorruptCheckpoint


class Counted:
    """Points that count how often they are measured; each takes a second of `clock`."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.seconds = 0.0

    def point(self, name: str, **facts: Any) -> Point:
        def measure() -> dict[str, Any]:
            self.measured.append(name)
            self.seconds += 1.0
            return {"name": name, **facts}

        return Point(name, facts, measure)

    def clock(self) -> float:
        return self.seconds


def test_a_point_is_measured_once(tmp_path: Path) -> None:
    counted = Counted()
    points = [counted.point("a"), counted.point("b", size=(1, 2))]
    first = Notebook(tmp_path).fill(points)
    second = Notebook(tmp_path).fill(points)
    assert counted.measured == ["a", "b"]
    assert first == second
    assert second["b"].value == {"name": "b", "size": [1, 2]}


def test_other_facts_are_another_point(tmp_path: Path) -> None:
    counted = Counted()
    Notebook(tmp_path).fill([counted.point("a", size=1)])
    found = Notebook(tmp_path).fill([counted.point("a", size=2)])
    assert found["a"].value["size"] == 2
    assert Notebook(tmp_path).known([counted.point("a", size=1)])["a"].value["size"] == 1


def test_nothing_begins_after_the_time(tmp_path: Path) -> None:
    counted = Counted()
    points = [counted.point(name) for name in "abcd"]
    found = Notebook(tmp_path, seconds=1.5, clock=counted.clock).fill(points)
    assert list(found) == ["a", "b"]
    found = Notebook(tmp_path, seconds=1.5, clock=counted.clock).fill(points)
    assert list(found) == list("abcd")
    assert counted.measured == list("abcd")


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    counted = Counted()
    points = [counted.point("a"), counted.point("b")]
    Notebook(tmp_path).fill(points)
    path = tmp_path / "points.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert list(Notebook(tmp_path).fill(points)) == ["a", "b"]
    assert counted.measured == ["a", "b", "b"]
    whole_lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["point"] for line in whole_lines] == ["a", "b"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_text("{}\n")
    with pytest.raises(CorruptCheckpoint, match=r"points\.jsonl: line 1"):
        Notebook(tmp_path).fill([])


def test_a_point_that_another_process_measures_is_left_to_it(tmp_path: Path) -> None:
    counted = Counted()
    other = Notebook(tmp_path)
    outer = Point("a", {}, lambda: list(other.fill([counted.point("a")])))
    assert Notebook(tmp_path).fill([outer])["a"].value == []
    assert counted.measured == []
