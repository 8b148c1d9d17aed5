"""RMSNorm and its gradient by GPU kernels. Legend: D the normalised dim, R rows.

A norm with its gradient moves 3 + 5 numbers for each of x, forward and backward: PyTorch's own steps move about thirty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.triton.sizes import next_power_of_2, num_warps
from qnext.ops.triton.trust import num_processors

MAX_ROW = 1 << 15  # numbers of a row that one program holds
_TILE = 2048  # numbers that a program of the gradient holds of each tensor, unless a row has more


class GateLayout(NamedTuple):
    """How the gates of heads lie in the rows of a projection: `repeats` heads one after another in each group."""

    num_heads: int
    repeats: int
    group: int  # numbers of a group
    first: int  # where its gates begin


class NormForm(NamedTuple):
    eps: float
    zero_centered: bool


_NO_GATES = GateLayout(1, 1, 0, 0)


def rows_of(x: Tensor) -> Tensor:
    """[rows, D] whose numbers lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def normed(
    x: Tensor,
    weight_D: Tensor,
    form: NormForm,
    gates: tuple[Tensor, GateLayout] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm of each row, times silu of its gate where there are gates: rows of a projection."""
    from qnext.ops.triton.kernels.norm import rms_norm_kernel

    size, rows = x.shape[-1], rows_of(x)
    gate_TX, layout = gates or (rows, _NO_GATES)
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    block = next_power_of_2(size)
    rms_norm_kernel[(len(rows),)](
        rows,
        weight_D.contiguous(),
        gate_TX,
        out,
        rows.stride(0),
        gate_TX.stride(0),
        *layout,
        size,
        form.eps,
        ZERO_CENTERED=form.zero_centered,
        HAS_GATE=gates is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


class NormGradients(NamedTuple):
    x: Tensor
    weight_D: Tensor


def normed_backward(
    x: Tensor,
    weight_D: Tensor,
    form: NormForm,
    grad: Tensor,
    gates: tuple[Tensor, GateLayout, Tensor] | None = None,
) -> NormGradients:
    """Gradients of x and the weight. That of the gates is written where they lie, into the third of `gates`.

    The weight's is a sum of sums, one for each program, in a fixed order: it has the same bits in every run.
    """
    from qnext.ops.triton.kernels.norm import rms_norm_backward_kernel

    size, rows = x.shape[-1], rows_of(x)
    gate_TX, layout, grad_gate_TX = gates or (rows, _NO_GATES, rows)
    block = next_power_of_2(size)
    tile = max(1, _TILE // block)
    num_programs = min(-(-len(rows) // tile), 4 * num_processors(x.device))
    rows_each = -(-len(rows) // num_programs)
    num_programs = -(-len(rows) // rows_each)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty((num_programs, size), dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(num_programs,)](
        rows,
        weight_D.contiguous(),
        gate_TX,
        grad.contiguous(),
        grad_x,
        grad_gate_TX,
        partial,
        rows.stride(0),
        gate_TX.stride(0),
        *layout,
        size,
        len(rows),
        rows_each,
        form.eps,
        ZERO_CENTERED=form.zero_centered,
        HAS_GATE=gates is not None,
        ROWS=tile,
        BLOCK=block,
        num_warps=num_warps(max(block, _TILE)),
    )
    return NormGradients(grad_x, partial.sum(0).to(weight_D.dtype))


def trained_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm. Only x and the weight are kept for the gradient."""
    return _RmsNorm.apply(x, weight_D, NormForm(eps, zero_centered))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, form: NormForm) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.form = form
        return normed(x, weight_D, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        return *normed_backward(x, weight_D, ctx.form, grad), None
