"""Memory for quantised weights, in the order in which they will be read. Legend: E experts, F outputs, D inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from qnext.ops.backends import CPU, backend_of
from qnext.ops.cpu.panels import PanelWeight
from qnext.ops.float8 import Fp8Weight
from qnext.ops.memory import empty_huge
from qnext.ops.quantized import QuantizedWeight


def empty_quantized(
    shape: tuple[int, ...],
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    has_zeros: bool = False,
    device: torch.device | str = "cpu",
    is_hosted: bool = False,
) -> QuantizedWeight | PanelWeight:
    """Memory for matrices [F, D] or [E, F, D]. Where the native kernels of the CPU run, it has the order of these.
    `is_hosted`: in memory of the host, and of the form that `device` reads.

    write_quantized fills it. Raises ValueError where the sizes do not fit together.
    """
    if group_size <= 0 or shape[-1] % group_size:
        raise ValueError(f"{shape[-1]} inputs are no whole number of groups of {group_size}")
    if not is_hosted and backend_of(torch.device(device)) is CPU and PanelWeight.fits(shape, group_size=group_size):
        return PanelWeight(shape, bits=bits, group_size=group_size, scale_dtype=scale_dtype, has_zeros=has_zeros)
    groups = (*shape[:-1], shape[-1] // group_size)
    empty = partial(empty_hosted if is_hosted else torch.empty, device=device)
    return QuantizedWeight(
        empty((*shape[:-1], shape[-1] * bits // 8), dtype=torch.uint8),
        empty(groups, dtype=scale_dtype),
        bits,
        group_size,
        empty(groups, dtype=torch.uint8) if has_zeros else None,
    )


def empty_fp8(
    shape: tuple[int, ...],
    *,
    block: tuple[int, int],
    scale_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    is_hosted: bool = False,
) -> Fp8Weight:
    """Memory for matrices [F, D] or [E, F, D] in fp8, which write_quantized fills; `is_hosted` as above."""
    grid = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)))
    empty = empty_hosted if is_hosted else empty_huge
    codes = empty(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    return Fp8Weight(codes, empty(grid, dtype=scale_dtype, device=device), block)


def empty_hosted(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory of the host, from which `device` copies: a GPU does so beside other work where no page can move."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")


def write_quantized(
    destination: QuantizedWeight | PanelWeight | Fp8Weight,
    source: QuantizedWeight | Fp8Weight,
    *,
    expert: int | None = None,
    row: int = 0,
) -> None:
    """Copy a matrix [f, D] to outputs row, row + 1, ... of the destination, or of one expert of it.

    Raises ValueError where bits, groups, blocks, zeros or sizes do not agree.
    """
    if isinstance(destination, Fp8Weight) or isinstance(source, Fp8Weight):
        _write_fp8(destination, source, expert, row)
        return
    if isinstance(destination, PanelWeight):
        destination.write(source, expert=expert or 0, row=row)
        return
    forms = [(w.bits, w.group_size, w.zeros is None) for w in (destination, source)]
    if forms[0] != forms[1]:
        raise ValueError(f"a weight of form {forms[1]} cannot be part of one of form {forms[0]}")
    rows = slice(row, row + source.shape[-2])
    place: tuple[int | slice, ...] = (rows,) if expert is None else (expert, rows)
    for to, values in (
        (destination.codes, source.codes),
        (destination.scales, source.scales),
        (destination.zeros, source.zeros),
    ):
        if to is not None and values is not None:
            to[place].copy_(values)


def _write_fp8(
    destination: QuantizedWeight | PanelWeight | Fp8Weight,
    source: QuantizedWeight | Fp8Weight,
    expert: int | None,
    row: int,
) -> None:
    if not (isinstance(destination, Fp8Weight) and isinstance(source, Fp8Weight) and source.block == destination.block):
        raise ValueError("a weight in fp8 can only be part of one with the same blocks")
    step = source.block[0]
    if row % step:
        raise ValueError(f"row {row} is inside a block of {step} outputs")
    of_expert = destination if expert is None else destination[expert]
    of_expert.codes[row : row + len(source.codes)].copy_(source.codes)
    of_expert.scales[row // step : row // step + len(source.scales)].copy_(source.scales)
