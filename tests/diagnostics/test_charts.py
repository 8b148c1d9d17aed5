"""Charts: every series and label is there and inside, and both kinds of files can be read."""

from __future__ import annotations

import doctest
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qnext.diagnostics import charts
from qnext.diagnostics.charts import COLORS, Axis, BarChart, Curve, LineChart, charts_shapes, ticks, write_charts
from qnext.diagnostics.shapes import Box, Dot, Label, Stroke
from qnext.errors import UsageError

from .pictures import read_png

LINES = LineChart(
    "speed <by> context",
    Axis("context", is_log=True),
    Axis("tokens/s"),
    [
        Curve("first", [512, 4096, 32768], [30, 29, 25], intervals=[(28, 32), (27, 31), (22, 27)]),
        Curve("bound", [512, 32768], [60, float("nan")], is_dashed=True),
    ],
)
BARS = BarChart("memory", Axis("GiB"), ["one", "other"], [("weights", [43, 17]), ("states", [0.5, 0])])


def test_examples() -> None:
    assert doctest.testmod(charts).failed == 0


def test_everything_is_drawn_and_inside() -> None:
    shapes, width, height = charts_shapes([LINES, BARS], title="a plan")
    texts = {shape.text for shape in shapes if isinstance(shape, Label)}
    assert {"a plan", "speed <by> context", "context", "tokens/s", "first", "bound", "weights", "GiB", "other"} <= texts
    assert {"1k", "10k", "30", "60"} <= texts, "ticks"
    for shape in shapes:
        places = shape.points if isinstance(shape, Stroke) else [(shape.x, shape.y)]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    assert len([shape for shape in shapes if isinstance(shape, Dot)]) == 3, "a bound has no points"
    lines = [shape for shape in shapes if isinstance(shape, Stroke) and shape.color == COLORS[0]]
    assert len(lines) == 4, "a line and three intervals"
    bars = [shape for shape in shapes if isinstance(shape, Box) and shape.width > 10]
    assert bars[0].height == pytest.approx(bars[1].height * 43 / 0.5), "as high as their values"
    assert bars[1].y + bars[1].height == pytest.approx(bars[0].y), "above each other"


@pytest.mark.parametrize("name", ["x.svg", "x.png"])
def test_files_can_be_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_charts(path, [LINES, BARS], title="a plan & more")
    if name.endswith("svg"):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "a plan & more" in words and "speed <by> context" in words
    else:
        pixels, palette = read_png(path.read_bytes())
        _, width, height = charts_shapes([LINES, BARS], title="")
        assert pixels.shape == (2 * height, 2 * width)
        colors = [palette[i : i + 3].hex() for i in range(0, len(palette), 3)]
        assert colors[0] == "ffffff" and COLORS[0].removeprefix("#") in colors
        assert (pixels == colors.index(COLORS[0].removeprefix("#"))).sum() > 10_000, "a bar"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        write_charts(tmp_path / "x.pdf", [LINES], title="")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 8), (0, 0.004), (0, 9e11), (7, 7.1)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, is_log=False)
    assert 2 <= len(found) <= 8 and all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in found)
    steps = {round((b - a) / (high - low), 6) for a, b in pairwise(found)}
    assert len(steps) == 1
    assert 1 <= len(ticks(max(low, 1e-3), max(high, 1), is_log=True)) <= 7
