"""Pictures for papers: which experts of a layer go together, and mass against effect of experts that were removed.

Legend: E experts, M cells of a side.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.charts import Axis, Curve, LineChart, write_charts
from qnext.diagnostics.heatmap import NUM_LEVELS, check_picture, palette
from qnext.diagnostics.raster import drawn_png
from qnext.diagnostics.routing.ablation import Ablation, ExpertEffect
from qnext.diagnostics.routing.pairs import lifts
from qnext.diagnostics.routing.record import RoutingRecord
from qnext.diagnostics.shapes import Box, Drawn, Label, drawn_svg
from qnext.files import write_file

_MOST_LAYERS = 8  # of a picture, evenly spread
_MOST_CELLS = 64  # of a side: more experts are averaged, as neighbours belong together
_SIDE, _GAP, _TOP, _COLUMNS = 192, 28, 64, 4
_BRIGHTEST = 8.0  # lift
_STEPS = 16  # of colour, so that neighbours join


def beside(path: Path, word: str) -> Path:
    """A picture that belongs to another one: `a.svg` and "pairs" give `a-pairs.svg`."""
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def write_pairs_picture(path: Path, record: RoutingRecord, *, title: str) -> None:
    """The lift of each pair of experts, a square for each layer, with groups side by side."""
    check_picture(path)
    num_layers = len(record.layers)
    places = np.linspace(0, num_layers - 1, min(_MOST_LAYERS, num_layers)).round().astype(int)
    shapes: list[Drawn] = [Label(_GAP, 22, title, size=14)]
    note = f"lift of pairs, experts in the order of their groups; from dark (never) to yellow ({_BRIGHTEST:g} and more)"
    shapes.append(Label(_GAP, 42, note))
    for number, place in enumerate(places):
        x = _GAP + number % _COLUMNS * (_SIDE + _GAP)
        y = _TOP + number // _COLUMNS * (_SIDE + _GAP)
        shapes.append(Label(x, y + 10, f"layer {record.labels[place]}"))
        shapes += _square(lifts(record, int(place)), x, y + 16)
    columns, rows = min(_COLUMNS, len(places)), -(-len(places) // _COLUMNS)
    width, height = max(640, _GAP + columns * (_SIDE + _GAP)), _TOP + rows * (_SIDE + _GAP) + _GAP
    is_png = path.suffix.lower() == ".png"
    draw = drawn_png if is_png else drawn_svg
    write_file(path, draw(shapes, width=width, height=height))


def write_effects_picture(path: Path, found: Ablation, *, title: str) -> None:
    """A dot for each expert that was removed, with the interval of its effect."""
    by_layer = {label: list(effects) for label, effects in groupby(found.effects, key=lambda each: each.label)}
    named = {f"layer {label}": effects for label, effects in by_layer.items()}
    curves = [_dots(name, each) for name, each in (named if len(named) <= 8 else {"experts": found.effects}).items()]
    x, y = Axis("share of the routing weight of its layer, %"), Axis("growth of the loss without it, mbit per byte")
    known = "" if found.mean_correlation is None else f", rank correlation {found.mean_correlation:+.2f}"
    write_charts(path, [LineChart(f"mass and effect ({found.removal}){known}", x, y, curves)], title=title)


def _dots(name: str, effects: list[ExpertEffect]) -> Curve:
    return Curve(
        name,
        [100 * each.mass_share for each in effects],
        [1000 * each.effect.value for each in effects],
        [(1000 * each.effect.low, 1000 * each.effect.high) for each in effects],
        has_line=False,
    )


def _square(lift_EE: NDArray[np.float64], x: float, y: float) -> list[Drawn]:
    """Cells of one colour beside each other are one box."""
    lift_MM = _averaged(lift_EE)
    scaled = np.log1p(lift_MM.clip(max=_BRIGHTEST)) / np.log1p(_BRIGHTEST) * (_STEPS - 1)
    levels_MM = np.where(lift_MM > 0, 1 + scaled.round() * (NUM_LEVELS - 1) // (_STEPS - 1), 0).astype(int)
    side, colors = _SIDE / len(levels_MM), palette()
    boxes: list[Drawn] = []
    for row, levels_M in enumerate(levels_MM.tolist()):
        column = 0
        for level, run in groupby(levels_M):
            width = len(list(run))
            color = "#{:02x}{:02x}{:02x}".format(*colors[level])
            boxes.append(Box(x + column * side, y + row * side, width * side, side, color))
            column += width
    return boxes


def _averaged(lift_EE: NDArray[np.float64]) -> NDArray[np.float64]:
    num_experts = len(lift_EE)
    if num_experts <= _MOST_CELLS:
        return lift_EE
    starts = np.arange(_MOST_CELLS) * num_experts // _MOST_CELLS
    sizes = np.diff(np.append(starts, num_experts))
    sums_MM = np.add.reduceat(np.add.reduceat(lift_EE, starts, axis=0), starts, axis=1)
    return np.asarray(sums_MM / np.outer(sizes, sizes))
