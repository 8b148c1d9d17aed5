"""Groupwise integer weights: their layout and the numbers that they stand for.

Legend: ... stacked experts or nothing, F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUANTIZED_BITS = (4, 8)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Matrices [..., F, D] of `bits`-bit codes with a scale for every `group_size` inputs of an output.

    value = (code - zero) * scale. `codes` is uint8 [..., F, D * bits / 8], the lower nibble first: the bytes of the
    int32 words that compressed-tensors calls pack-quantized. `scales` is [..., F, G] in bf16, f16 or fp32. Without
    `zeros` (uint8 [..., F, G], a code each) the zero is 2 ** (bits - 1), which is the symmetric form.
    Raises ValueError where sizes do not fit together.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in QUANTIZED_BITS:
            raise ValueError(f"codes of {self.bits} bits are not supported, only of {QUANTIZED_BITS}")
        if self.group_size <= 0:
            raise ValueError(f"group_size must be positive, not {self.group_size}")
        if self.codes.dtype != torch.uint8 or self.codes.dim() < 2:
            raise ValueError(f"codes must be uint8 matrices, not {self.codes.dtype} of shape {list(self.codes.shape)}")
        num_inputs = self.codes.shape[-1] * 8 // self.bits
        groups = (*self.codes.shape[:-1], num_inputs // self.group_size)
        if num_inputs % self.group_size:
            raise ValueError(f"{num_inputs} inputs are no whole number of groups of {self.group_size}")
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and tuple(tensor.shape) != groups:
                raise ValueError(f"{name} have shape {list(tensor.shape)}, the codes ask for {list(groups)}")

    @property
    def shape(self) -> torch.Size:
        """[..., F, D]"""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales. The codes are integers."""
        return self.scales.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it keeps in memory."""
        return [tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same codes on `device`, or itself where they are there already."""
        if torch.empty(0, device=device).device == self.codes.device:
            return self
        zeros = None if self.zeros is None else self.zeros.to(device)
        return QuantizedWeight(self.codes.to(device), self.scales.to(device), self.bits, self.group_size, zeros)

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """One matrix of a stack."""
        zeros = None if self.zeros is None else self.zeros[expert]
        return QuantizedWeight(self.codes[expert], self.scales[expert], self.bits, self.group_size, zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., F, D]: computed in fp32 and rounded once to `dtype`."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        grouped = codes.unflatten(-1, (-1, self.group_size)).to(torch.float32)
        zeros = 2.0 ** (self.bits - 1) if self.zeros is None else self.zeros.to(torch.float32)[..., None]
        return (grouped - zeros).mul_(self.scales.to(torch.float32)[..., None]).flatten(-2).to(dtype)


def pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """uint8 codes, one to a byte, [..., D] -> [..., D * bits / 8], the lower nibble first."""
    if bits == 8:
        return codes
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)
