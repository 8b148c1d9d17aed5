"""Products of few rows with matrices, by GPU kernels. Legend: T rows, D inputs, F outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.backends import is_interpreted
from qnext.ops.checks import check_linear, check_norm, check_same_shape
from qnext.ops.records import Norm, NormedLinears
from qnext.ops.triton.codes import fits, read, weights_to_try
from qnext.ops.triton.trust import is_trusted, numbers, take
from qnext.ops.weights import Weight

_FEW_ROWS = 256  # of matrices of codes; for more of them, or of fp32, their numbers are made once
_FEW_WIDE_ROWS = 64
_FEW_ROWS_OF_FLOATS = 16  # more of them are multiplied best by torch, unless codes are multiplied beside them
_MOST_WEIGHTS = 3  # of one start


class Tile(NamedTuple):
    rows: int  # of a program
    outputs: int
    inputs: int  # that are read at a time
    stages: int  # of reading, before which products begin

    @staticmethod
    def of(x_TD: Tensor, num_outputs: int) -> Tile:
        """Some hundred programs, or fewer that read more ahead: else memory waits for them. Of many rows one program
        takes as many as it can, so that a matrix is read seldom. Rows in fp32 take thrice the products, and their
        operands twice the room."""
        if x_TD.dtype == torch.float32:
            return Tile(16, 16, 128, 3)
        if len(x_TD) > 16:
            return Tile(64, 32, 128, 3)
        return Tile(16, 32, 128, 3) if num_outputs >= 8192 else Tile(16, 16, 256, 5)

    def grid(self, num_rows: int, *sizes: int) -> tuple[int, int]:
        """Of products with matrices of so many outputs."""
        return sum(-(-size // self.outputs) for size in sizes), -(-num_rows // self.rows)


def serves_linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> bool:
    """Whether the weight is codes, and the rows are few: floats are multiplied best by torch."""
    return not isinstance(weight_FD, Tensor) and bias_F is None and _take_rows(x_TD, weight_FD)


def _take_rows(x_TD: Tensor, *weights: Tensor | Weight) -> bool:
    most = _FEW_WIDE_ROWS if x_TD.dtype == torch.float32 else _FEW_ROWS
    if all(isinstance(weight, Tensor) for weight in weights):
        most = _FEW_ROWS_OF_FLOATS
    return (
        all(map(fits, weights))
        and x_TD.dim() == 2
        and 0 < len(x_TD) <= most
        and take(x_TD, *(weight for weight in weights if isinstance(weight, Tensor)))
        and all(weight.dtype == x_TD.dtype for weight in weights if isinstance(weight, Tensor))
        and is_trusted(try_linear, x_TD.device)
    )


def linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> Tensor:
    """See ops.linear. The numbers of the weight are rounded to the dtype of x; sums are fp32."""
    assert bias_F is None, "ask whether it serves first"
    return _product(x_TD, weight_FD, None)


def serves_add_linear(residual_TF: Tensor, x_TD: Tensor, weight_FD: Tensor | Weight) -> bool:
    """Whether the rows are few; floats have the dtype of the rows."""
    return residual_TF.dtype == x_TD.dtype and take(residual_TF) and _take_rows(x_TD, weight_FD)


def add_linear(residual_TF: Tensor, x_TD: Tensor, weight_FD: Tensor | Weight) -> Tensor:
    """See ops.add_linear. The sum is fp32 and cast once."""
    return _product(x_TD, weight_FD, residual_TF)


def _product(x_TD: Tensor, weight_FD: Tensor | Weight, residual_TF: Tensor | None) -> Tensor:
    from qnext.ops.triton.kernels.matrices import linear_codes_kernel

    check_linear(x_TD, weight_FD)
    weight, x_TD = read(weight_FD), side_by_side(x_TD)
    (num_rows, num_inputs), num_outputs = x_TD.shape, weight_FD.shape[0]
    out_TF = torch.empty((num_rows, num_outputs), dtype=x_TD.dtype, device=x_TD.device)
    added_TF = out_TF if residual_TF is None else side_by_side(residual_TF)
    check_same_shape(out_TF, added_TF)
    tile = Tile.of(x_TD, num_outputs)
    linear_codes_kernel[tile.grid(num_rows, num_outputs)](
        x_TD,
        *weight.memory,
        added_TF,
        out_TF,
        x_TD.stride(0),
        added_TF.stride(0),
        num_rows,
        num_outputs,
        num_inputs,
        FORM=weight.form.at_least(tile.inputs),
        HAS_RESIDUAL=residual_TF is not None,
        IS_WIDE=is_wide(x_TD),
        BLOCK_T=tile.rows,
        BLOCK_F=tile.outputs,
        num_warps=4,
        num_stages=tile.stages,
    )
    return out_TF


def side_by_side(x_TD: Tensor) -> Tensor:
    """The same rows, whose numbers lie side by side."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def is_wide(x_TD: Tensor) -> bool:
    """Whether operands of products are fp32. The interpreter knows no products of bf16."""
    return x_TD.dtype == torch.float32 or is_interpreted()


def serves_normed_linears(x_TD: Tensor, norm: Norm, weights: tuple[Tensor | Weight, ...]) -> bool:
    """Whether the rows and the matrices are few. Rows in fp16 could be too large before they are divided."""
    return (
        0 < len(weights) <= _MOST_WEIGHTS
        and x_TD.dtype != torch.float16
        and take(x_TD, norm.weight_D)
        and _take_rows(x_TD, *weights)
        and is_trusted(try_normed_linears, x_TD.device)
    )


def normed_linears(x_TD: Tensor, norm: Norm, weights: tuple[Tensor | Weight, ...]) -> NormedLinears:
    """See ops.normed_linears. A row is multiplied by the scale of the norm in fp32 and rounded once to its dtype; sums
    are fp32 and divided by the row's root mean square."""
    from qnext.ops.triton.kernels.matrices import normed_linears_kernel

    check_norm(x_TD, norm.weight_D)
    for weight in weights:
        check_linear(x_TD, weight)
    x_TD = side_by_side(x_TD)
    sizes, (num_rows, num_inputs) = [weight.shape[0] for weight in weights], x_TD.shape
    rows_TD, *products = (
        torch.empty((num_rows, size), dtype=x_TD.dtype, device=x_TD.device) for size in (num_inputs, *sizes)
    )
    tile, missing = Tile.of(x_TD, sum(sizes)), _MOST_WEIGHTS - len(weights)
    readable = [read(weight) for weight in weights]
    memory = [(*weight.memory, out_TF) for weight, out_TF in zip(readable, products, strict=True)]
    memory += [(x_TD,) * 4] * missing
    forms = [*(weight.form.at_least(tile.inputs) for weight in readable), *[None] * missing]
    normed_linears_kernel[tile.grid(num_rows, *sizes)](
        x_TD,
        norm.weight_D.contiguous(),
        rows_TD,
        *(tensor for each in memory for tensor in each),
        x_TD.stride(0),
        num_rows,
        num_inputs,
        norm.eps,
        *sizes,
        *[0] * missing,
        FIRST=forms[0],
        SECOND=forms[1],
        THIRD=forms[2],
        ZERO_CENTERED=norm.zero_centered,
        IS_WIDE=is_wide(x_TD),
        BLOCK_T=tile.rows,
        BLOCK_F=tile.outputs,
        num_warps=4,
        num_stages=tile.stages,
    )
    return NormedLinears(rows_TD, tuple(products))


def try_linear(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """With a residual and without."""
    x_TD, residual_TF = numbers(3, 96, seed=0, device=device), numbers(3, 20, seed=1, device=device)
    weights: list[Tensor | Weight] = [numbers(20, 96, seed=5, device=device), *weights_to_try((20, 96), device)]
    for weight in weights:
        wanted = reference.linear(x_TD, weight)
        yield linear(x_TD, weight), wanted
        yield add_linear(residual_TF, x_TD, weight), residual_TF + wanted


def try_normed_linears(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and floats in one start."""
    x_TD, norm_D = numbers(3, 96, seed=0, device=device), numbers(96, seed=1, device=device, scale=0.2)
    weights: tuple[Tensor | Weight, ...] = (*weights_to_try((20, 96), device), numbers(36, 96, seed=2, device=device))
    for given, zero_centered in ((weights[1:], True), (weights[:2], False), (weights[3:], True)):
        norm = Norm(norm_D, 1e-6, zero_centered)
        ours, theirs = normed_linears(x_TD, norm, given), reference.normed_linears(x_TD, norm, given)
        yield ours.rows_TD, theirs.rows_TD
        yield from zip(ours.products, theirs.products, strict=True)
