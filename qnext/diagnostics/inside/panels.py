"""Matrices as pictures side by side, each with its own scale: rows are layers, columns heads or distances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.charts import short_number
from qnext.diagnostics.heatmap import NUM_LEVELS, check_picture, palette
from qnext.diagnostics.raster import drawn_png
from qnext.diagnostics.shapes import FONT, Box, Drawn, Label, Stroke, drawn_svg
from qnext.files import write_file

_LEFT, _TOP, _TITLE, _BOTTOM, _SCALE_WIDTH, _GAP = 48, 34, 34, 40, 96, 24
_LEAST, _MOST = 9.0, 22.0  # units of a cell


class Panel(NamedTuple):
    """`values` are [layers, columns]; NaN is empty. The scale goes from `low` to `high` or over the values."""

    title: str
    values: NDArray[np.float64]
    row_labels: Sequence[str]
    column_label: str
    column_labels: Sequence[str] = ()  # numbers from 0 without
    is_log: bool = False
    low: float | None = None
    high: float | None = None


def write_panels(path: Path, rows: Sequence[Sequence[Panel]], *, title: str) -> None:
    """SVG or PNG, as the name ends. Raises UsageError for another name."""
    check_picture(path)
    shapes: list[Drawn] = [Label(_LEFT, 20, title, size=14)]
    width, top = _LEFT + 7.5 * len(title), float(_TITLE + _TOP)
    for row in rows:
        left, height = float(_LEFT), 0.0
        for panel in row:
            shapes += _drawn(panel, left, top)
            cells = _cell(panel) * panel.values.shape[1] + _SCALE_WIDTH
            left += max(cells, 6.5 * len(panel.title)) + _LEFT + _GAP
            height = max(height, _cell(panel) * panel.values.shape[0], 2 * NUM_LEVELS)
        width, top = max(width, left), top + height + _BOTTOM + _TOP
    size = {"width": math.ceil(width), "height": math.ceil(top - _TOP)}
    write_file(path, drawn_png(shapes, **size) if path.suffix.lower() == ".png" else drawn_svg(shapes, **size))


def _cell(panel: Panel) -> float:
    return max(_LEAST, min(_MOST, 420 / max(1, panel.values.shape[1])))


def _drawn(panel: Panel, left: float, top: float) -> Iterator[Drawn]:
    cell, colors = _cell(panel), ["#{:02x}{:02x}{:02x}".format(*color) for color in palette()[1:]]
    num_rows, num_columns = panel.values.shape
    low, high = _range(panel)
    yield Label(left, top - 12, panel.title, size=12)
    yield Label(left - 6, top - 2, "layer", "end", size=9)
    for row, values in enumerate(panel.values):
        yield Label(left - 6, top + (row + 0.5) * cell + FONT / 3, panel.row_labels[row], "end")
        for column, value in enumerate(values):
            if math.isfinite(value):
                level = round(_part(value, low, high, panel.is_log) * (NUM_LEVELS - 1))
                yield Box(left + column * cell, top + row * cell, cell, cell, colors[level])
    bottom = top + num_rows * cell
    step = max(1, math.ceil(36 / cell))
    for column in range(0, num_columns, step):
        text = panel.column_labels[column] if panel.column_labels else str(column)
        yield Label(left + (column + 0.5) * cell, bottom + 14, text, "middle")
    yield Label(left + num_columns * cell / 2, bottom + 30, panel.column_label, "middle")
    right = left + num_columns * cell + 12
    for level, color in enumerate(colors):
        yield Box(right, top + 2 * (NUM_LEVELS - 1 - level), 12, 2, color)
    for part in (0.0, 0.5, 1.0):
        value = low * (high / low) ** part if panel.is_log else low + (high - low) * part
        y = top + 2 * NUM_LEVELS * (1 - part)
        yield Stroke([(right + 12, y), (right + 16, y)])
        yield Label(right + 19, y + FONT / 3, short_number(value))


def _range(panel: Panel) -> tuple[float, float]:
    known = panel.values[np.isfinite(panel.values) & ((panel.values > 0) | (not panel.is_log))]
    low = panel.low if panel.low is not None else float(known.min(initial=math.inf))
    high = panel.high if panel.high is not None else float(known.max(initial=-math.inf))
    if not math.isfinite(low) or not math.isfinite(high):
        return 1.0, 2.0
    return (low, high) if high > low else (low, 2 * low if low > 0 else low + 1)


def _part(value: float, low: float, high: float, is_log: bool) -> float:
    if is_log:
        return min(1.0, max(0.0, math.log(max(value, low) / low) / math.log(high / low)))
    return min(1.0, max(0.0, (value - low) / (high - low)))
