"""What was seen.

Legend: T tokens of a call, R rows that were kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.probe.rows import BatchRows, SequenceName


class KeptRows(NamedTuple):
    """Rows of one call of the model. Without `rows` nobody knows which tokens they are."""

    rows: BatchRows | None
    chosen_R: Tensor | None  # of the call's rows; None: all
    values_R: Tensor

    def places(self) -> Iterator[tuple[SequenceName, int]]:
        """The sequence and the position of each row."""
        assert self.rows is not None
        numbers = range(len(self.values_R)) if self.chosen_R is None else self.chosen_R.tolist()
        return ((self.rows.sequence_of(row), self.rows.positions[row]) for row in numbers)


class Captures:
    """By tap: the rows that were kept, call after call."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[KeptRows]] = {}

    def put(self, tap: str, piece: KeptRows) -> None:
        """What a call computes again takes the place of what it computed before."""
        pieces = self._pieces.setdefault(tap, [])
        if pieces and piece.rows is not None and pieces[-1].rows is piece.rows:
            pieces.pop()
        pieces.append(piece)

    def clear(self) -> None:
        self._pieces.clear()

    def names(self) -> list[str]:
        return list(self._pieces)

    def pieces(self, tap: str) -> list[KeptRows]:
        """Raises UsageError for a tap of which nothing was kept."""
        if tap not in self._pieces:
            raise UsageError(f"nothing was seen of {tap!r}")
        return self._pieces[tap]

    def values(self, tap: str) -> Tensor:
        """[R, ...]: all rows in the order in which they were computed."""
        return _cat([piece.values_R for piece in self.pieces(tap)])

    def places(self, tap: str) -> list[tuple[SequenceName, int]]:
        """The sequence and the position of each row of `values`."""
        return [place for piece in self.pieces(tap) for place in piece.places()]

    def of_sequence(self, tap: str, sequence: SequenceName) -> tuple[list[int], Tensor]:
        """Positions in order, and their rows. Of a position that was computed twice, the last row counts."""
        found = {at: row for row, (name, at) in enumerate(self.places(tap)) if name == sequence}
        positions = sorted(found)
        rows = torch.tensor([found[at] for at in positions], dtype=torch.long)
        values = self.values(tap)
        return positions, values.index_select(0, rows.to(values.device))


def _cat(values: list[Tensor]) -> Tensor:
    """Rows of attention see contexts of different lengths: they are filled up with zeros."""
    longest = max(each.shape[-1] for each in values)
    return torch.cat([torch.nn.functional.pad(each, (0, longest - each.shape[-1])) for each in values])
