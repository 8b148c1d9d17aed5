"""Where a tensor lies, as headers say it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class TensorInfo(NamedTuple):
    """Where one tensor lies: bytes [start, end) of `file`, counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start
