"""How kernels read weights: as codes with scales, or as floats. Legend: F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.float8 import Fp8Weight
from qnext.ops.quantized import QuantizedWeight
from qnext.ops.triton import forms
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.trust import DTYPES, numbers
from qnext.ops.weights import Weight


class ReadForm(NamedTuple):
    """What the numbers of a weight are: a constant of a program, see kernels/codes.py."""

    form: int
    has_zeros: bool = False
    scale_rows: int = 1  # outputs that share a scale
    group: int = 128  # inputs that share a scale

    def at_least(self, block_inputs: int) -> tuple[int, bool, int, int, int]:
        """With the inputs that a program reads at a time: so many, or a whole group."""
        return *self, max(block_inputs, self.group)


class ReadWeight(NamedTuple):
    """How a kernel reads a weight: its memory, and what is there."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    form: ReadForm

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.zeros


def fits(weight: Tensor | Weight) -> bool:
    """Whether a kernel can read the weight."""
    if isinstance(weight, QuantizedWeight):
        return _is_power_of_2(weight.group_size) and all(x.is_contiguous() for x in weight.tensors)
    if isinstance(weight, Fp8Weight):
        return _is_power_of_2(weight.block[1]) and all(x.is_contiguous() for x in weight.tensors)
    return isinstance(weight, Tensor) and weight.dtype in DTYPES and weight.is_contiguous()


def _is_power_of_2(size: int) -> bool:
    return size == next_power_of_2(size)


def read(weight: Tensor | Weight) -> ReadWeight:
    """Of a weight that fits."""
    if isinstance(weight, Tensor):
        return ReadWeight(weight, weight, weight, ReadForm(forms.FLOATS))
    if isinstance(weight, Fp8Weight):
        form = ReadForm(forms.FP8, False, *weight.block)
        return ReadWeight(weight.codes, weight.scales, weight.codes, form)
    assert isinstance(weight, QuantizedWeight), "ask whether it fits first"
    kind = forms.INT4 if weight.bits == 4 else forms.INT8
    zeros = weight.codes if weight.zeros is None else weight.zeros
    form = ReadForm(kind, weight.zeros is not None, 1, weight.group_size)
    return ReadWeight(weight.codes, weight.scales, zeros, form)


def weights_to_try(shape: tuple[int, ...], device: torch.device) -> Iterator[Weight]:
    """Codes of every kind, for self-tests."""
    numbers_FD = numbers(*shape, seed=5, device=device)
    for bits, columns in ((4, shape[-1] // 2), (8, shape[-1])):
        codes = (numbers(*shape[:-1], columns, seed=6, device=device) * 50 + 128).clamp(0, 255).to(torch.uint8)
        scales = numbers(*shape[:-1], shape[-1] // 16, seed=7, device=device, scale=0.1)
        yield QuantizedWeight(codes, scales, bits, 16)
    blocks = tuple(-(-size // 16) for size in shape[-2:])
    scales = numbers(*shape[:-2], *blocks, seed=8, device=device)
    yield Fp8Weight(numbers_FD.to(torch.float8_e4m3fn), scales, (16, 16))
