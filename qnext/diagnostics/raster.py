"""Shapes and letters as pixels of a PNG file.

Legend: H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qnext.diagnostics.pixels import Color, Pixels, encoded_png
from qnext.diagnostics.shapes import Box, Dot, Drawn, Label, Stroke

_SCALE = 2  # pixels of a unit: letters of seven dots are as high as a font of 7 units
# The usual letters of five columns of seven dots, from the space to the tilde; the lowest bit is the uppermost dot.
_LETTERS = bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a1223130864623649562050000807030000 1c2241000041221c002a1c7f1c2a"
    "08083e08080080703000080808080800006060002010080402 3e5149453e00427f400072494949462141494d331814127f10274545453"
    "93c4a4949314121110907364949493646494929 1e000014000000403400000008142241141414141400412214080201590906"
    "3e415d594e7c1211127c7f494949363e414141227f4141413e7f494949417f090909013e415151737f0808087f00417f4100204041 3f01"
    "7f081422417f404040407f021c027f7f0408107f3e4141413e7f090909063e4151215e7f0919294626494949320301 7f01033f4040403f"
    "1f2040201f3f4038403f631408146303047804036159494d43007f4141410204081020004141417f04020102044040404040"
    "000307080020545478407f284444383844444428384444287f385454541800087e090218a4a49c787f0804047800447d4000"
    "2040403d007f1028440000417f40007c047804787c080404783844444438fc18242418 18242418fc7c080404084854545424"
    "04043f44243c4040207c1c2040201c3c4030403c44281028444c9090907c4464544c44000836410000007700000041360800"
    "0201020402".replace(" ", "")
)
_COLUMNS, _ADVANCE, _HEIGHT = 5, 6, 7


def drawn_png(shapes: Sequence[Drawn], *, width: int, height: int) -> bytes:
    """The shapes, later ones above earlier ones, on white."""
    canvas = _Canvas(width, height)
    for shape in shapes:
        canvas.draw(shape)
    return encoded_png(canvas.pixels_HW, canvas.colors)


class _Canvas:
    """Pixels as numbers of the colours that were used so far."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels_HW: Pixels = np.zeros((height * _SCALE, width * _SCALE), dtype=np.uint8)
        self.colors: list[Color] = [(255, 255, 255)]

    def draw(self, shape: Drawn) -> None:
        number = self._number(shape.color)
        if isinstance(shape, Box):
            self._box(shape, number)
        elif isinstance(shape, Stroke):
            for start, end in zip(shape.points, shape.points[1:], strict=False):
                self._line(start, end, shape, number)
        elif isinstance(shape, Dot):
            self._dot(shape.x * _SCALE, shape.y * _SCALE, shape.radius * _SCALE, number)
        else:
            self._text(shape, number)

    def _number(self, color: str) -> int:
        red, green, blue = bytes.fromhex(color.removeprefix("#"))
        if (red, green, blue) not in self.colors:
            self.colors.append((red, green, blue))
        return self.colors.index((red, green, blue))

    def _box(self, box: Box, number: int) -> None:
        left, top = round(box.x * _SCALE), round(box.y * _SCALE)
        right, bottom = round((box.x + box.width) * _SCALE), round((box.y + box.height) * _SCALE)
        self.pixels_HW[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = number

    def _line(self, start: tuple[float, float], end: tuple[float, float], stroke: Stroke, number: int) -> None:
        """Discs along the line; of a dashed one every other 5 units."""
        (x0, y0), (x1, y1) = start, end
        length = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) * _SCALE))
        for step in range(length + 1):
            if stroke.is_dashed and step // (5 * _SCALE) % 2:
                continue
            part = step / length
            x, y = x0 + (x1 - x0) * part, y0 + (y1 - y0) * part
            self._dot(x * _SCALE, y * _SCALE, stroke.width * _SCALE / 2, number)

    def _dot(self, x: float, y: float, radius: float, number: int) -> None:
        reach = max(0.5, radius)
        left, top = max(0, round(x - reach)), max(0, round(y - reach))
        area = self.pixels_HW[top : max(top, round(y + reach)), left : max(left, round(x + reach))]
        rows, columns = np.ogrid[: area.shape[0], : area.shape[1]]
        area[(rows + top + 0.5 - y) ** 2 + (columns + left + 0.5 - x) ** 2 <= reach**2 + 0.25] = number

    def _text(self, label: Label, number: int) -> None:
        known = [ord(letter) - 32 if 32 <= ord(letter) < 127 else ord("?") - 32 for letter in label.text]
        dots = np.zeros((8, max(1, _ADVANCE * len(known))), dtype=bool)
        for place, letter in enumerate(known):
            columns = _LETTERS[letter * _COLUMNS : (letter + 1) * _COLUMNS]
            for column, bits in enumerate(columns):
                dots[:, place * _ADVANCE + column] = [bits >> row & 1 for row in range(8)]
        size = max(1, round(label.size * _SCALE / 11))  # pixels of a dot
        mask = dots.repeat(size, axis=0).repeat(size, axis=1)
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor] * mask.shape[1]
        x, y = label.x * _SCALE, label.y * _SCALE
        if label.is_upright:
            mask = np.rot90(mask)
            left, top = round(x - _HEIGHT * size), round(y + shift - mask.shape[0])
        else:
            left, top = round(x - shift), round(y - _HEIGHT * size)
        left, top = max(0, left), max(0, top)
        area = self.pixels_HW[top : top + mask.shape[0], left : left + mask.shape[1]]
        area[mask[: area.shape[0], : area.shape[1]]] = number
