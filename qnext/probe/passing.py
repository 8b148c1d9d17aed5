"""What passes by the taps of a call that is recorded. A replay writes it again to the same memory.

Legend: T rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from torch import Tensor

from qnext.probe.rows import BatchRows

FromRows: TypeAlias = Callable[[Tensor], Tensor]


def as_it_is(x_T: Tensor) -> Tensor:
    return x_T


class _Passed(NamedTuple):
    tap: str
    x_T: Tensor
    rows: BatchRows | None  # those that were there when the call was recorded
    make: FromRows


class Passing:
    """Tensors in the order in which a call computes them. While this is there, their memory serves nothing else."""

    def __init__(self) -> None:
        self._passed: list[_Passed] = []

    def add(self, tap: str, x_T: Tensor, rows: BatchRows | None, make: FromRows) -> None:
        self._passed.append(_Passed(tap, x_T, rows, make))

    @property
    def tensors(self) -> list[Tensor]:
        return [each.x_T for each in self._passed]

    def at(self, tensors: list[Tensor]) -> Passing:
        """The same, where the memory of another run of the call is."""
        found = Passing()
        found._passed = [each._replace(x_T=x_T) for each, x_T in zip(self._passed, tensors, strict=True)]
        return found

    def __iter__(self) -> Iterator[_Passed]:
        return iter(self._passed)
