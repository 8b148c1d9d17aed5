"""What the numbers of a weight are in memory, as programs and wrappers number it."""

from __future__ import annotations

FLOATS, FP8, INT8, INT4 = range(4)
