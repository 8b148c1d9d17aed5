"""Weights in fp8 with a scale for each block, as released: they stay codes in memory.

Legend: ... stacked experts or nothing, F outputs, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """Matrices [..., F, D] in float8_e4m3fn, with a scale for each block of `block` outputs and inputs.

    value = code * scale. `scales` is [..., ceil(F / block[0]), ceil(D / block[1])] in fp32 or bf16. Raises ValueError
    where sizes do not fit together.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.float8_e4m3fn or self.codes.dim() < 2:
            shape = list(self.codes.shape)
            raise ValueError(f"codes must be float8_e4m3fn matrices, not {self.codes.dtype} of shape {shape}")
        sizes = zip(self.codes.shape[-2:], self.block, strict=True)
        wanted = (*self.codes.shape[:-2], *(-(-size // step) for size, step in sizes))
        if tuple(self.scales.shape) != wanted:
            raise ValueError(f"scales have shape {list(self.scales.shape)}, the codes ask for {list(wanted)}")

    @property
    def shape(self) -> torch.Size:
        """[..., F, D]"""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return self.scales.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it keeps in memory."""
        return [self.codes, self.scales]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> Fp8Weight:
        """The same codes on `device`, or itself where they are there already."""
        if torch.empty(0, device=device).device == self.codes.device:
            return self
        return Fp8Weight(self.codes.to(device), self.scales.to(device), self.block)

    def __getitem__(self, expert: int) -> Fp8Weight:
        """One matrix of a stack."""
        return Fp8Weight(self.codes[expert], self.scales[expert], self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., F, D]: computed in fp32 and rounded once to `dtype`."""
        rows, columns = self.codes.shape[-2:]
        scales = self.scales.to(torch.float32)
        if rows % self.block[0] == 0 and columns % self.block[1] == 0:  # without scales as large as the matrix
            numbers = self.codes.to(torch.float32)
            blocks = numbers.unflatten(-1, (-1, self.block[1])).unflatten(-3, (-1, self.block[0]))
            blocks.mul_(scales[..., :, None, :, None])
            return numbers.to(dtype)
        for axis, step, size in ((-2, self.block[0], rows), (-1, self.block[1], columns)):
            scales = scales.repeat_interleave(step, dim=axis).narrow(axis, 0, size)
        return (self.codes.to(torch.float32) * scales).to(dtype)
