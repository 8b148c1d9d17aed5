"""PNG files of pixels that are numbers of colours. Standard library and numpy only.

Legend: H height, W width.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]
Pixels = NDArray[np.uint8]


def encoded_png(pixels_HW: Pixels, colors: Sequence[Color]) -> bytes:
    """A picture whose pixels are numbers of `colors`, at most 256."""
    height, width = pixels_HW.shape
    rows = np.zeros((height, 1 + width), dtype=np.uint8)  # each row begins with filter 0
    rows[:, 1:] = pixels_HW
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),  # 8 bits, palette
            _chunk(b"PLTE", b"".join(bytes(color) for color in colors)),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
