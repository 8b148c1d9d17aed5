"""What pictures are made of: strokes, boxes, dots and letters, in units with the origin at the upper left; and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

FONT = 11  # units
INK, FAINT, PAPER = "#222222", "#d9d9d9", "#ffffff"


class Stroke(NamedTuple):
    """Straight lines from point to point."""

    points: Sequence[tuple[float, float]]
    color: str = INK
    width: float = 1.0
    is_dashed: bool = False


class Box(NamedTuple):
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    color: str


class Dot(NamedTuple):
    """A filled circle."""

    x: float
    y: float
    radius: float
    color: str


class Label(NamedTuple):
    """A line of text above the point, whose start, middle or end is there. An upright one reads from below."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    size: float = FONT
    is_upright: bool = False
    color: str = INK


Drawn = Stroke | Box | Dot | Label


def drawn_svg(shapes: Sequence[Drawn], *, width: int, height: int) -> str:
    """The shapes, later ones above earlier ones, on white: readable on a dark page too."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="{FONT}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    return "\n".join([*parts, *map(_element, shapes), "</svg>\n"])


def _element(shape: Drawn) -> str:
    if isinstance(shape, Box):
        place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
        return f'<rect {place} fill="{shape.color}"/>'
    if isinstance(shape, Dot):
        return f'<circle cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}" fill="{shape.color}"/>'
    if isinstance(shape, Stroke):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        dashes = ' stroke-dasharray="5 4"' if shape.is_dashed else ""
        return (
            f'<polyline points="{points}" fill="none" stroke="{shape.color}" stroke-width="{shape.width:g}"{dashes}/>'
        )
    turned = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.is_upright else ""
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" font-size="{shape.size:g}" '
        f'fill="{shape.color}"{turned}>{escape(shape.text)}</text>'
    )
