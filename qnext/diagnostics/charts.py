"""Charts: lines with points and intervals, and stacked bars, side by side in one SVG or PNG. No library draws them.

lines = LineChart("decode", Axis("context", is_log=True), Axis("tokens/s"), [Curve("80b", [1e3, 1e4], [30, 20])])
write_charts(Path("speed.svg"), [lines], title="80b-a3b")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qnext.diagnostics.heatmap import check_picture
from qnext.diagnostics.raster import drawn_png
from qnext.diagnostics.shapes import FAINT, FONT, INK, Box, Dot, Drawn, Label, Stroke, drawn_svg
from qnext.files import write_file

# Of Okabe and Ito: told apart by the colour-blind, neither lost on white nor on black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#b8a800")
WIDTH, HEIGHT = 460, 320  # units of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM, _TITLE, _LEGEND_ROW = 64, 16, 30, 48, 34, 16


class Axis(NamedTuple):
    """Its values begin with `low` and end with `high` where they are given, else with the data's. A scale of equal
    steps begins with zero unless told otherwise."""

    label: str
    is_log: bool = False
    low: float | None = None
    high: float | None = None


class Curve(NamedTuple):
    """Points in the order of x. `intervals` have what is below and above each y. Without a line there are only dots."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    has_line: bool = True
    is_dashed: bool = False
    color: str | None = None


class LineChart(NamedTuple):
    """Curves over numbers."""

    title: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]


class BarChart(NamedTuple):
    """A bar for each of `groups`, of `stacks` above each other: (name, value for each group). Bars of an axis with a
    logarithm cannot be stacked."""

    title: str
    y: Axis
    groups: Sequence[str]
    stacks: Sequence[tuple[str, Sequence[float]]]


Chart = LineChart | BarChart


def write_charts(path: Path, charts: Sequence[Chart], *, title: str) -> None:
    """Charts from left to right. Raises UsageError for a name that ends neither in `.svg` nor in `.png`."""
    check_picture(path)
    shapes, width, height = charts_shapes(charts, title=title)
    if path.suffix.lower() == ".png":
        write_file(path, drawn_png(shapes, width=width, height=height))
    else:
        write_file(path, drawn_svg(shapes, width=width, height=height))


def charts_shapes(charts: Sequence[Chart], *, title: str) -> tuple[list[Drawn], int, int]:
    """All shapes, and the size of the picture."""
    most_entries = max(len(_names(chart)) for chart in charts)
    shapes: list[Drawn] = [Label(_LEFT, 20, title, size=14)]
    for number, chart in enumerate(charts):
        shapes += _chart(chart, _Area(number * WIDTH + _LEFT, _TITLE + _TOP))
    return shapes, WIDTH * len(charts), _TITLE + HEIGHT + _LEGEND_ROW * -(-most_entries // 2)


def ticks(low: float, high: float, *, is_log: bool, most: int = 7) -> list[float]:
    """Round numbers from `low` to `high`.

    >>> ticks(0, 47, is_log=False)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    >>> ticks(500, 40_000, is_log=True)
    [500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0]
    """
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            found = [value for value in found if low * 0.999 <= value <= high * 1.001]
            if found and len(found) <= most:
                return found
        return found[:: max(1, -(-len(found) // most))] or [low]
    raw = (high - low) / most
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * base for factor in (1, 2, 5, 10) if factor * base >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """
    >>> [short_number(value) for value in (0, 0.25, 950, 32_000, 1_500_000, 15e12)]
    ['0', '0.25', '950', '32k', '1.5M', '15T']
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


class _Area(NamedTuple):
    """Where a chart's frame begins."""

    left: float
    top: float
    width: float = WIDTH - _LEFT - _RIGHT
    height: float = HEIGHT - _TOP - _BOTTOM


class _Scale(NamedTuple):
    """From values to units."""

    low: float
    high: float
    is_log: bool
    start: float
    length: float

    def place(self, value: float) -> float:
        if self.is_log:
            span = math.log(self.high / self.low)
            part = math.log(max(value, self.low) / self.low) / span if span else 0.5
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + self.length * part


def _scale(axis: Axis, values: Sequence[float], start: float, length: float) -> _Scale:
    known = [value for value in values if math.isfinite(value) and (value > 0 or not axis.is_log)] or [1.0]
    low = axis.low if axis.low is not None else min(known) if axis.is_log else min(0.0, *known, 0.0)
    high = axis.high if axis.high is not None else max(known)
    if high <= low:
        high = 2 * low if low > 0 else low + 1
    if axis.high is None and not axis.is_log:
        high = low + (high - low) * 1.05
    return _Scale(low, high, axis.is_log, start, length)


def _chart(chart: Chart, area: _Area) -> Iterator[Drawn]:
    yield Label(area.left, area.top - 10, chart.title, size=12)
    if isinstance(chart, LineChart):
        yield from _lines(chart, area)
    else:
        yield from _bars(chart, area)
    bottom = area.top + area.height
    yield Stroke([(area.left, area.top), (area.left, bottom), (area.left + area.width, bottom)])
    yield from _legend(chart, area)


def _lines(chart: LineChart, area: _Area) -> Iterator[Drawn]:
    bottom = area.top + area.height
    x = _scale(chart.x, [value for each in chart.curves for value in each.x], area.left, area.width)
    heights = [value for each in chart.curves for value in (*each.y, *(end for pair in each.intervals for end in pair))]
    y = _scale(chart.y, heights, bottom, -area.height)
    yield from _grid(y, chart.y.label, area)
    for value in ticks(x.low, x.high, is_log=x.is_log):
        yield Stroke([(x.place(value), bottom), (x.place(value), bottom + 4)])
        yield Label(x.place(value), bottom + 17, short_number(value), "middle")
    yield Label(area.left + area.width / 2, bottom + 34, chart.x.label, "middle")
    for number, each in enumerate(chart.curves):
        color = each.color or COLORS[number % len(COLORS)]
        points = [(x.place(a), y.place(b)) for a, b in zip(each.x, each.y, strict=True) if math.isfinite(b)]
        for (at, _), (below, above) in zip(points, each.intervals, strict=False):
            yield Stroke([(at, y.place(below)), (at, y.place(above))], color)
        if each.has_line and len(points) > 1:
            yield Stroke(points, color, 2, each.is_dashed)
        if not each.is_dashed:
            for at, height in points:
                yield Dot(at, height, 2.5, color)


def _bars(chart: BarChart, area: _Area) -> Iterator[Drawn]:
    bottom = area.top + area.height
    sums = [sum(values[number] for _, values in chart.stacks) for number in range(len(chart.groups))]
    y = _scale(chart.y, sums, bottom, -area.height)
    yield from _grid(y, chart.y.label, area)
    room = area.width / max(1, len(chart.groups))
    for number, group in enumerate(chart.groups):
        height = 0.0
        for place, (_, values) in enumerate(chart.stacks):
            top = y.place(height + values[number])
            box = Box(area.left + room * (number + 0.15), top, room * 0.7, y.place(height) - top, _color(place))
            yield box
            height += values[number]
        yield Label(area.left + room * (number + 0.5), bottom + 17, group, "middle")


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _grid(y: _Scale, label: str, area: _Area) -> Iterator[Drawn]:
    for value in ticks(y.low, y.high, is_log=y.is_log):
        height = y.place(value)
        yield Stroke([(area.left, height), (area.left + area.width, height)], FAINT)
        yield Label(area.left - 6, height + FONT / 3, short_number(value), "end")
    yield Label(area.left - 44, area.top + area.height / 2, label, "middle", is_upright=True)


def _names(chart: Chart) -> list[tuple[str, str]]:
    """Names and colours of the legend; a curve without a name is not in it."""
    if isinstance(chart, BarChart):
        return [(name, _color(number)) for number, (name, _) in enumerate(chart.stacks)]
    return [(each.name, each.color or _color(number)) for number, each in enumerate(chart.curves) if each.name]


def _legend(chart: Chart, area: _Area) -> Iterator[Drawn]:
    """Two entries a row, below the axis."""
    for number, (name, color) in enumerate(_names(chart)):
        x = area.left + (number % 2) * area.width / 2
        y = area.top + area.height + _BOTTOM + 4 + _LEGEND_ROW * (number // 2)
        yield Box(x, y - 8, 10, 10, color)
        yield Label(x + 15, y + 1, name, color=INK)
