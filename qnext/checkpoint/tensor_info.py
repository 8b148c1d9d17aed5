"""Where a tensor lies, according to the headers. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class TensorInfo(NamedTuple):
    """Where one tensor lies: bytes [start, end) of `file`, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start
