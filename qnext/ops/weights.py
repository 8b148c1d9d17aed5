"""What a matrix of weights may be: a tensor, or a Weight that stands for one.

Legend: E experts, F outputs, D inputs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Weight(Protocol):
    """Matrices [F, D], or stacked [E, F, D], whose numbers are computed from what is in memory.

    Ops that multiply take a Weight wherever they take a tensor.
    """

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers: [F, D] or [E, F, D]."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values that the numbers are computed from, for instance of the scales."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it keeps in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors`."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, computed in fp32 and rounded once to `dtype`."""

    def to(self, device: torch.device | str) -> Weight:
        """The same numbers on `device`, or itself where they are there already."""

    def __getitem__(self, expert: int) -> Tensor | Weight:
        """One matrix of a stack."""


def dequantize(weight: Tensor | Weight, dtype: torch.dtype) -> Tensor:
    """The numbers of a weight, in `dtype`. A tensor that has this dtype is not copied."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)
