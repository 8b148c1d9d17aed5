"""Products of rows with matrices that stay codes. The numbers of a matrix are rounded to the dtype of the rows.

Legend: T rows, E experts, D inputs, F outputs, G groups of inputs with a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.codes import codes_at


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
    HAS_ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x W^T [T, F] in fp32 of rows at some addresses, over the inputs before `end`."""
    y_TF = tl.zeros([row_ptr_T.shape[0], at_F.shape[0]], tl.float32)
    for first in range(0, end, BLOCK_D):
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
            HAS_ZEROS,
            SCALE_ROWS,
            GROUP,
            BLOCK_D,
        )
        at_D = first + tl.arange(0, BLOCK_D)
        is_in_TD = is_row_T[:, None] & (at_D < num_inputs)[None, :]
        x_TD = tl.load(row_ptr_T[:, None] + at_D[None, :], mask=is_in_TD, other=0.0)
        w_FD = tl.reshape(codes_FGD * scales_FG[:, :, None], [at_F.shape[0], BLOCK_D]).to(x_TD.dtype)
        if IS_WIDE:
            y_TF += tl.dot(x_TD.to(tl.float32), tl.trans(w_FD.to(tl.float32)), input_precision="tf32x3")
        else:
            y_TF += tl.dot(x_TD, tl.trans(w_FD))
    return y_TF


@triton.jit
def linear_codes_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    x_stride,
    num_rows,
    num_outputs,
    num_inputs,
    FORM: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x W^T of some rows and some outputs."""
    at_T = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    at_F = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_row_T = at_T < num_rows
    y_TF = multiplied(
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
        HAS_ZEROS,
        SCALE_ROWS,
        GROUP,
        IS_WIDE,
        BLOCK_D,
    )
    is_in_TF = is_row_T[:, None] & (at_F < num_outputs)[None, :]
    out_at = out_ptr + at_T[:, None] * num_outputs + at_F[None, :]
    tl.store(out_at, y_TF.to(out_ptr.dtype.element_ty), mask=is_in_TF)


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
    HAS_ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    y_TF = multiplied(
        x_ptr + source_T * x_stride,
        is_row_T,
        *weight,
        at_F,
        num_outputs,
        tl.where(begin < end, num_inputs, 0),
        num_inputs,
        FORM,
        HAS_ZEROS,
        SCALE_ROWS,
        GROUP,
        IS_WIDE,
        BLOCK_D,
    )
    is_in_TF = is_row_T[:, None] & (at_F < num_outputs)[None, :]
    out_at = out_ptr + at_T.to(tl.int64)[:, None] * num_outputs + at_F[None, :]
    tl.store(out_at, y_TF.to(out_ptr.dtype.element_ty), mask=is_in_TF)
