"""Products of rows with matrices, as codes or as floats. The numbers of a matrix are rounded to the dtype of the rows.

A norm of the rows needs no pass of its own: the rows are multiplied by its scale as they are read, their squares are
added up beside the products, and the products are divided by the root at the end.

Legend: T rows, E experts, D inputs, F outputs, G groups of inputs with a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.codes import codes_at
from qnext.ops.triton.kernels.norm import norm_scale


@triton.jit
def multiplied(
    row_ptr_T,
    is_row_T,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    expert,
    at_F,
    num_outputs,
    end,
    num_inputs,
    FORM: tl.constexpr,
    norm_ptr,
    IS_NORMED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """x W^T [T, F] in fp32 of rows at some addresses, over the inputs before `end`.

    With IS_NORMED x is multiplied by the scale of the norm, and the sums of squares of the rows [T] are there as well.
    """
    y_TF = tl.zeros([row_ptr_T.shape[0], at_F.shape[0]], tl.float32)
    squares_T = tl.zeros([row_ptr_T.shape[0]], tl.float32)
    for first in range(0, end, FORM[4]):
        codes_FGD, scales_FG = codes_at(
            weight_ptr,
            scales_ptr,
            zeros_ptr,
            expert,
            at_F,
            first,
            num_outputs,
            num_inputs,
            FORM,
        )
        at_D = first + tl.arange(0, FORM[4])
        is_in_TD = is_row_T[:, None] & (at_D < num_inputs)[None, :]
        x_TD = tl.load(row_ptr_T[:, None] + at_D[None, :], mask=is_in_TD, other=0.0)
        if IS_NORMED:
            wide_TD = x_TD.to(tl.float32)
            squares_T += tl.sum(wide_TD * wide_TD, axis=1)
            scale_D = norm_scale(norm_ptr, at_D, at_D < num_inputs, ZERO_CENTERED)
            x_TD = (wide_TD * scale_D[None, :]).to(x_TD.dtype)
        w_FD = tl.reshape(codes_FGD * scales_FG[:, :, None], [at_F.shape[0], FORM[4]]).to(x_TD.dtype)
        if IS_WIDE:
            y_TF += tl.dot(x_TD.to(tl.float32), tl.trans(w_FD.to(tl.float32)), input_precision="tf32x3")
        else:
            y_TF += tl.dot(x_TD, tl.trans(w_FD))
    return y_TF, squares_T


@triton.jit
def linear_codes_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    num_rows,
    num_outputs,
    num_inputs,
    FORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """x W^T of some rows and some outputs, added to a residual where there is one."""
    at_T = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    at_F = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_row_T = at_T < num_rows
    is_in_TF = is_row_T[:, None] & (at_F < num_outputs)[None, :]
    y_TF, _ = multiplied(
        x_ptr + at_T * x_stride,
        is_row_T,
        weight_ptr,
        scales_ptr,
        zeros_ptr,
        0,
        at_F,
        num_outputs,
        num_inputs,
        num_inputs,
        FORM,
        x_ptr,
        False,
        False,
        IS_WIDE,
    )
    if HAS_RESIDUAL:
        residual_at = residual_ptr + at_T[:, None] * residual_stride + at_F[None, :]
        y_TF += tl.load(residual_at, mask=is_in_TF, other=0.0).to(tl.float32)
    out_at = out_ptr + at_T[:, None] * num_outputs + at_F[None, :]
    tl.store(out_at, y_TF.to(out_ptr.dtype.element_ty), mask=is_in_TF)


@triton.jit
def normed_product(
    tile,
    x_ptr,
    norm_ptr,
    at_T,
    x_stride,
    num_rows,
    num_inputs,
    eps,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_outputs,
    FORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Writes norm(x) W^T of some rows and some outputs; returns what the rows were divided by."""
    at_F = tile.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_row_T = at_T < num_rows
    y_TF, squares_T = multiplied(
        x_ptr + at_T * x_stride,
        is_row_T,
        weight_ptr,
        scales_ptr,
        zeros_ptr,
        0,
        at_F,
        num_outputs,
        num_inputs,
        num_inputs,
        FORM,
        norm_ptr,
        True,
        ZERO_CENTERED,
        IS_WIDE,
    )
    root_T = tl.sqrt(squares_T / num_inputs + eps)
    out_at = out_ptr + at_T[:, None] * num_outputs + at_F[None, :]
    is_in_TF = is_row_T[:, None] & (at_F < num_outputs)[None, :]
    tl.store(out_at, (y_TF / root_T[:, None]).to(out_ptr.dtype.element_ty), mask=is_in_TF)
    return root_T


@triton.jit
def store_normed(
    tile,
    num_tiles,
    x_ptr,
    norm_ptr,
    at_T,
    x_stride,
    num_rows,
    num_inputs,
    root_T,
    rows_ptr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes norm(x) of some rows: of all blocks of columns those of one program of several."""
    for begin in range(tile * BLOCK_D, num_inputs, num_tiles * BLOCK_D):
        at_D = begin + tl.arange(0, BLOCK_D)
        is_in_TD = (at_T < num_rows)[:, None] & (at_D < num_inputs)[None, :]
        x_TD = tl.load(x_ptr + (at_T * x_stride)[:, None] + at_D[None, :], mask=is_in_TD, other=0.0).to(tl.float32)
        y_TD = x_TD / root_T[:, None] * norm_scale(norm_ptr, at_D, at_D < num_inputs, ZERO_CENTERED)[None, :]
        rows_at = rows_ptr + (at_T * num_inputs)[:, None] + at_D[None, :]
        tl.store(rows_at, y_TD.to(rows_ptr.dtype.element_ty), mask=is_in_TD)


@triton.jit
def normed_linears_kernel(
    x_ptr,
    norm_ptr,
    rows_ptr,
    first_ptr,
    first_scales_ptr,
    first_zeros_ptr,
    first_out_ptr,
    second_ptr,
    second_scales_ptr,
    second_zeros_ptr,
    second_out_ptr,
    third_ptr,
    third_scales_ptr,
    third_zeros_ptr,
    third_out_ptr,
    x_stride,
    num_rows,
    num_inputs,
    eps,
    num_first,
    num_second,
    num_third,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """norm(x) W^T of up to three matrices, whose tiles of outputs are numbered one after another; and norm(x) itself.

    FIRST, SECOND and THIRD are the forms of the matrices, or None. Tiles of the first
    matrix write the normed rows, some columns each.
    """
    tile = tl.program_id(0)
    at_T = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rows = (x_ptr, norm_ptr, at_T, x_stride, num_rows, num_inputs)
    num_tiles = tl.cdiv(num_first, BLOCK_F)
    tiles_of_two = num_tiles + tl.cdiv(num_second, BLOCK_F)
    if tile < num_tiles:
        memory = (first_ptr, first_scales_ptr, first_zeros_ptr, first_out_ptr, num_first)
        root_T = normed_product(tile, *rows, eps, *memory, FIRST, ZERO_CENTERED, IS_WIDE, BLOCK_F)
        store_normed(tile, num_tiles, *rows, root_T, rows_ptr, ZERO_CENTERED, FIRST[4])
    else:
        if SECOND is not None:
            if tile < tiles_of_two:
                memory = (second_ptr, second_scales_ptr, second_zeros_ptr, second_out_ptr, num_second)
                normed_product(tile - num_tiles, *rows, eps, *memory, SECOND, ZERO_CENTERED, IS_WIDE, BLOCK_F)
            else:
                if THIRD is not None:
                    memory = (third_ptr, third_scales_ptr, third_zeros_ptr, third_out_ptr, num_third)
                    normed_product(tile - tiles_of_two, *rows, eps, *memory, THIRD, ZERO_CENTERED, IS_WIDE, BLOCK_F)


@triton.jit
def grouped_codes_kernel(
    x_ptr,
    tokens_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    ends_ptr,
    out_ptr,
    x_stride,
    num_experts,
    num_outputs,
    num_inputs,
    FORM: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows sorted by expert times the matrix of their expert: some rows of one expert and some outputs.

    Tiles of rows are numbered through all experts, whose ends are read here. A tile behind the last one has no rows.
    With HAS_TOKENS a sorted row is that of its token in x.
    """
    tile, at_E = tl.program_id(1), tl.arange(0, BLOCK_E)
    ends_E = tl.load(ends_ptr + at_E, mask=at_E < num_experts, other=0)
    begins_E = tl.load(ends_ptr + at_E - 1, mask=(at_E > 0) & (at_E < num_experts), other=0)
    tiles_E = (ends_E - begins_E + BLOCK_T - 1) // BLOCK_T
    tile_ends_E = tl.cumsum(tl.where(at_E < num_experts, tiles_E, 0), axis=0)
    passed_E = (tile_ends_E <= tile) & (at_E < num_experts)
    expert = tl.minimum(tl.sum(passed_E.to(tl.int32), axis=0), num_experts - 1)
    is_own_E = at_E == expert
    begin, end = tl.sum(tl.where(is_own_E, begins_E, 0), axis=0), tl.sum(tl.where(is_own_E, ends_E, 0), axis=0)
    before = tl.sum(tl.where(is_own_E, tile_ends_E - tiles_E, 0), axis=0)
    at_T = begin + (tile - before) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_F = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_row_T = at_T < end
    source_T = tl.load(tokens_ptr + at_T, mask=is_row_T, other=0) if HAS_TOKENS else at_T.to(tl.int64)
    weight = (weight_ptr, scales_ptr, zeros_ptr, expert.to(tl.int64))
    y_TF, _ = multiplied(
        x_ptr + source_T * x_stride,
        is_row_T,
        *weight,
        at_F,
        num_outputs,
        tl.where(begin < end, num_inputs, 0),
        num_inputs,
        FORM,
        x_ptr,
        False,
        False,
        IS_WIDE,
    )
    is_in_TF = is_row_T[:, None] & (at_F < num_outputs)[None, :]
    out_at = out_ptr + at_T.to(tl.int64)[:, None] * num_outputs + at_F[None, :]
    tl.store(out_at, y_TF.to(out_ptr.dtype.element_ty), mask=is_in_TF)
