"""Memory for quantised weights, in the order in which they will be read. Legend: E experts, F outputs, D inputs."""

from __future__ import annotations

import torch

from qnext.ops.backends import CPU, backend_of
from qnext.ops.cpu.panels import PanelWeight
from qnext.ops.quantized import QuantizedWeight


def empty_quantized(
    shape: tuple[int, ...],
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    has_zeros: bool = False,
    device: torch.device | str = "cpu",
) -> QuantizedWeight | PanelWeight:
    """Memory for matrices [F, D] or [E, F, D]. Where the native kernels of the CPU run, it has the order of these.

    write_quantized fills it. Raises ValueError where the sizes do not fit together.
    """
    if group_size <= 0 or shape[-1] % group_size:
        raise ValueError(f"{shape[-1]} inputs are no whole number of groups of {group_size}")
    if backend_of(torch.device(device)) is CPU and PanelWeight.fits(shape, group_size=group_size):
        return PanelWeight(shape, bits=bits, group_size=group_size, scale_dtype=scale_dtype, has_zeros=has_zeros)
    groups = (*shape[:-1], shape[-1] // group_size)
    return QuantizedWeight(
        torch.empty((*shape[:-1], shape[-1] * bits // 8), dtype=torch.uint8, device=device),
        torch.empty(groups, dtype=scale_dtype, device=device),
        bits,
        group_size,
        torch.empty(groups, dtype=torch.uint8, device=device) if has_zeros else None,
    )


def write_quantized(
    destination: QuantizedWeight | PanelWeight, source: QuantizedWeight, *, expert: int | None = None, row: int = 0
) -> None:
    """Copy a matrix [f, D] to outputs row, row + 1, ... of the destination, or of one expert of it.

    Raises ValueError where bits, groups, zeros or sizes do not agree.
    """
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
