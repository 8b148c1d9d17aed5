"""What was predicted on this machine and then measured: a file of lines beside the calibration. No torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qnext.errors import warn
from qnext.files import new_file

_KEPT = 2000  # lines, the newest


class MeasuredFigure(NamedTuple):
    """Tokens a second of `kind`, decode or prompt, at a length."""

    date: str
    model: str
    kind: str
    length: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def measured_file(calibration: Path) -> Path:
    """Beside the calibration of the same machine."""
    return calibration.with_suffix(".measured.jsonl")


def note_measured(path: Path, figures: Sequence[MeasuredFigure]) -> None:
    kept = [*read_measured(path), *figures][-_KEPT:]
    with new_file(path, with_parents=True) as file:
        file.write("".join(json.dumps(each._asdict()) + "\n" for each in kept).encode())


def read_measured(path: Path) -> list[MeasuredFigure]:
    """Lines that cannot be read are left out with a warning."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        try:
            each = MeasuredFigure(**json.loads(line))
            if not (each.predicted > 0 and each.measured > 0):
                raise ValueError("no speed")
            found.append(each)
        except (ValueError, TypeError, RecursionError):
            warn(f"{path}: a line that is no figure is left out")
    return found


def told_errors(figures: Sequence[MeasuredFigure]) -> str:
    """
    >>> told_errors([MeasuredFigure("2026-11-30", "m", "decode", 512, 11.0, 10.0)])
    'of 1 figure measured here the median error is 10.0%, the worst 10.0%'
    """
    sizes = [abs(each.error) for each in figures]
    plural = "s" if len(sizes) > 1 else ""
    return (
        f"of {len(sizes)} figure{plural} measured here the median error is {statistics.median(sizes):.1%}, the worst "
        f"{max(sizes):.1%}"
    )
