"""A matrix as a picture: layers down, experts across. SVG with labels, or PNG with plain cells. Standard library only.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.pixels import encoded_png
from qnext.errors import UsageError
from qnext.files import write_file

NUM_LEVELS = 64
_SUFFIXES = (".png", ".svg")
_NEVER = (24, 20, 32)  # of an expert that no token chose: off the scale
# From dark violet over green to yellow, of growing lightness, also for the colour-blind.
_STOPS = ((72, 40, 120), (62, 74, 137), (38, 130, 142), (53, 183, 121), (109, 205, 89), (253, 231, 37))
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_BOTTOM, _MARGIN_RIGHT, _FONT = 60, 48, 40, 130, 11


def check_picture(path: Path) -> None:
    """Raises UsageError for a name whose picture could not be written."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{path}: pictures are {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder for the picture")


def write_picture(path: Path, loads_LE: NDArray[np.float64], *, labels: Sequence[str], title: str) -> None:
    """`png` or `svg`, as the name ends."""
    is_png = path.suffix.lower() == ".png"
    write_file(path, png(loads_LE) if is_png else svg(loads_LE, labels=labels, title=title))


def levels_of(loads_LE: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[L, E]: 0 for a load of zero, else 1 to NUM_LEVELS on a scale of log(1 + load) up to `scale_top`."""
    top = scale_top(loads_LE)
    scaled = np.log1p(loads_LE) / math.log1p(top) * (NUM_LEVELS - 1)
    return np.where(loads_LE > 0, 1 + np.clip(scaled, 0, NUM_LEVELS - 1).round(), 0).astype(np.uint8)


def scale_top(loads_LE: NDArray[np.float64]) -> float:
    """The load that is brightest: the highest one, but 4 at least, so that balanced layers look balanced."""
    return max(4.0, float(loads_LE.max(initial=0.0)))


def palette() -> list[tuple[int, int, int]]:
    """Red, green and blue of level 0 and of all others."""
    colors = [_NEVER]
    for level in range(NUM_LEVELS):
        place = level / (NUM_LEVELS - 1) * (len(_STOPS) - 1)
        index = min(int(place), len(_STOPS) - 2)
        low, high, part = _STOPS[index], _STOPS[index + 1], place - index
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
        colors.append((red, green, blue))
    return colors


def png(loads_LE: NDArray[np.float64]) -> bytes:
    """Cells 4 to 16 pixels wide, the fewer the more experts, and up to 16 high: 512 experts should be no thin line."""
    num_layers, num_experts = loads_LE.shape
    width = max(4, min(16, 2048 // max(1, num_experts)))
    height = max(width, min(16, num_experts * width // (2 * max(1, num_layers))))
    pixels = levels_of(loads_LE).repeat(height, axis=0).repeat(width, axis=1)
    return encoded_png(pixels, palette())


def svg(loads_LE: NDArray[np.float64], *, labels: Sequence[str], title: str) -> str:
    """`labels` name the layers; a legend says which colour is how many times the fair share."""
    num_layers, num_experts = loads_LE.shape
    width = max(2, min(24, 1536 // max(1, num_experts)))
    height = max(14, min(24, width))
    right, bottom = _MARGIN_LEFT + num_experts * width, _MARGIN_TOP + num_layers * height
    size = (max(right, _MARGIN_LEFT + 7 * len(title)) + _MARGIN_RIGHT, max(bottom, _MARGIN_TOP + 140) + _MARGIN_BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" font-size="{_FONT}">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="#fff"/>',
        f'<text x="{_MARGIN_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<g transform="translate({_MARGIN_LEFT} {_MARGIN_TOP}) scale({width} {height})" shape-rendering="crispEdges">',
        *_paths(levels_of(loads_LE)),
        "</g>",
    ]
    for layer, label in enumerate(labels):
        y = _MARGIN_TOP + layer * height + height / 2 + _FONT / 3
        parts.append(f'<text x="{_MARGIN_LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(label)}</text>')
    step = _tick_step(num_experts, width)
    for expert in range(0, num_experts, step):
        x = _MARGIN_LEFT + expert * width + width / 2
        parts.append(f'<text x="{x:g}" y="{bottom + 16}" text-anchor="middle">{expert}</text>')
    parts.append(f'<text x="{(_MARGIN_LEFT + right) / 2:g}" y="{bottom + 33}" text-anchor="middle">expert</text>')
    parts.append(f'<text x="6" y="{_MARGIN_TOP - 8}">layer</text>')
    parts += _legend(right + 16, scale_top(loads_LE))
    return "\n".join([*parts, "</svg>\n"])


def _paths(levels_LE: NDArray[np.uint8]) -> list[str]:
    """A path for each colour: unit cells, those side by side as one."""
    runs: dict[int, list[str]] = {}
    for layer, row in enumerate(levels_LE):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for start, end in pairwise(starts):
            runs.setdefault(int(row[start]), []).append(f"M{start} {layer}h{end - start}v1h-{end - start}z")
    colors = palette()
    return [f'<path fill="{_hex(colors[level])}" d="{"".join(cells)}"/>' for level, cells in sorted(runs.items())]


def _legend(x: int, top: float) -> list[str]:
    """The scale, brightest above, with the loads that stand for some of its colours."""
    parts, colors, step = [], palette(), 2
    y_of_level = [_MARGIN_TOP + (NUM_LEVELS - level) * step for level in range(NUM_LEVELS + 1)]
    parts += [
        f'<rect x="{x}" y="{y_of_level[level]:g}" width="14" height="{step}" fill="{_hex(colors[level])}"/>'
        for level in range(1, NUM_LEVELS + 1)
    ]
    for load in (top, top / 2, 1.0):
        y = y_of_level[1 + round(math.log1p(load) / math.log1p(top) * (NUM_LEVELS - 1))] + _FONT / 3
        parts.append(f'<text x="{x + 20}" y="{y:.1f}">{load:.3g} × fair share</text>')
    y = y_of_level[0] + 12
    parts.append(f'<rect x="{x}" y="{y:g}" width="14" height="12" fill="{_hex(_NEVER)}"/>')
    parts.append(f'<text x="{x + 20}" y="{y + 10:g}">no token</text>')
    return parts


def _tick_step(num_experts: int, width: int) -> int:
    """Experts between two numbers on the axis: a power of two, with room for the numbers."""
    step = 1
    while step * width < 30 and step < num_experts:
        step *= 2
    return step


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
