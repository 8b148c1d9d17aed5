"""Shares of right answers as a picture: depths down, lengths across, a map for each task. SVG, or PNG with plain cells.

Legend: P depths, S lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.heatmap import NUM_LEVELS, palette
from qnext.diagnostics.pixels import encoded_png
from qnext.eval.tasks import SuiteReport
from qnext.files import write_file

_LEFT, _TOP, _WIDTH, _HEIGHT, _BELOW, _FONT = 90, 54, 64, 26, 44, 12
_NOTHING = 0  # the level of a cell that was not asked
_DARK = NUM_LEVELS // 2  # up to here text on a cell is white


class DepthMap(NamedTuple):
    """`shares_PS` from 0 to 1, NaN where nothing was asked; `notes_PS` is what a pointer over a cell shows."""

    title: str
    depths: Sequence[str]
    lengths: Sequence[str]
    shares_PS: NDArray[np.float64]
    notes_PS: Sequence[Sequence[str]]


def write_depth_maps(path: Path, maps: Sequence[DepthMap], *, title: str) -> None:
    """`png` or `svg`, as the name ends."""
    write_file(path, _png(maps) if path.suffix.lower() == ".png" else svg_of_maps(maps, title=title))


def _levels(shares_PS: NDArray[np.float64]) -> NDArray[np.uint8]:
    asked = ~np.isnan(shares_PS)
    return np.where(asked, 1 + np.round(np.nan_to_num(shares_PS) * (NUM_LEVELS - 1)), _NOTHING).astype(np.uint8)


def _png(maps: Sequence[DepthMap]) -> bytes:
    """The maps one below the other, with a dark line between them."""
    blocks = [_levels(each.shares_PS).repeat(24, axis=0).repeat(24, axis=1) for each in maps]
    width = max(block.shape[1] for block in blocks)
    padded = [np.pad(block, ((0, 8), (0, width - block.shape[1]))) for block in blocks]
    return encoded_png(np.concatenate(padded), palette())


def svg_of_maps(maps: Sequence[DepthMap], *, title: str) -> str:
    """Every cell has its share as text, and its note for a pointer."""
    tops = [_TOP]
    for each in maps:
        tops.append(tops[-1] + 24 + _HEIGHT * len(each.depths) + _BELOW)
    width = max(_LEFT + _WIDTH * max(len(each.lengths) for each in maps) + 24, _LEFT + 8 * len(title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{tops[-1]}" viewBox="0 0 {width} {tops[-1]}" '
        f'font-family="sans-serif" font-size="{_FONT}">',
        f'<rect width="{width}" height="{tops[-1]}" fill="#fff"/>',
        f'<text x="16" y="26" font-size="15">{escape(title)}</text>',
    ]
    for each, top in zip(maps, tops, strict=False):
        parts += _one(each, top)
    return "\n".join([*parts, "</svg>\n"])


def _one(each: DepthMap, top: int) -> list[str]:
    parts = [f'<text x="16" y="{top + 10}" font-weight="bold">{escape(each.title)}</text>']
    colors, levels_PS, top = palette(), _levels(each.shares_PS), top + 20
    for row, depth in enumerate(each.depths):
        y = top + row * _HEIGHT
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(depth)}</text>')
        for column in range(len(each.lengths)):
            level, x = int(levels_PS[row, column]), _LEFT + column * _WIDTH
            color = "#{:02x}{:02x}{:02x}".format(*colors[level]) if level else "#ddd"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" fill="{color}">'
                f"<title>{escape(each.notes_PS[row][column])}</title></rect>"
            )
            if level:
                ink = "#fff" if level <= _DARK else "#000"
                parts.append(
                    f'<text x="{x + _WIDTH / 2:g}" y="{y + 17}" text-anchor="middle" fill="{ink}">'
                    f"{each.shares_PS[row, column]:.0%}</text>"
                )
    below = top + len(each.depths) * _HEIGHT + 16
    for column, length in enumerate(each.lengths):
        parts.append(f'<text x="{_LEFT + (column + 0.5) * _WIDTH:g}" y="{below}" text-anchor="middle">{length}</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="{below}" text-anchor="end">tokens</text>')
    return parts


def maps_of(report: SuiteReport) -> list[DepthMap]:
    """A map for each task. Where a task has no depth there is one row."""
    found = []
    for kind in report.kinds:
        cells = report.of(kind)
        lengths = sorted({cell.length for cell in cells})
        depths = sorted({cell.depth for cell in cells}, key=lambda depth: -1.0 if depth is None else depth)
        shares_PS = np.full((len(depths), len(lengths)), np.nan)
        notes_PS = [["not asked"] * len(lengths) for _ in depths]
        for cell in cells:
            row, column = depths.index(cell.depth), lengths.index(cell.length)
            shares_PS[row, column] = cell.exact.value
            notes_PS[row][column] = f"{cell.exact.percent()} of {cell.num_problems}"
        names = ["" if depth is None else f"{depth:.0%} deep" for depth in depths]
        title = f"{kind}: {report.total(kind).percent()}"
        found.append(DepthMap(title, names, [f"{length:,}" for length in lengths], shares_PS, notes_PS))
    return found
