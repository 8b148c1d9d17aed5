"""RMSNorm of rows and its gradient, with a gate or without. Legend: D the normalised dim, R rows of a tile.

A gate lies in the rows of a projection: per group of `repeats` heads one after another, `group` numbers between groups.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_scale(norm_ptr, at_D, is_in_D, ZERO_CENTERED: tl.constexpr):
    """What a norm multiplies by, in fp32."""
    scale_D = tl.load(norm_ptr + at_D, mask=is_in_D, other=0.0).to(tl.float32)
    return scale_D + 1.0 if ZERO_CENTERED else scale_D


@triton.jit
def gate_place(row, row_stride, num_heads, repeats, group, first, size):
    """Where the gate of a row begins; a row is one head of a token."""
    head = row % num_heads
    return row // num_heads * row_stride + head // repeats * group + first + head % repeats * size


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    out_ptr,
    row_stride,
    gate_stride,
    num_heads,
    repeats,
    group,
    first,
    size,
    eps,
    ZERO_CENTERED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at_D = tl.arange(0, BLOCK)
    is_in_D = at_D < size
    x_D = tl.load(x_ptr + row * row_stride + at_D, mask=is_in_D, other=0.0).to(tl.float32)
    scale_D = norm_scale(weight_ptr, at_D, is_in_D, ZERO_CENTERED)
    y_D = x_D / tl.sqrt(tl.sum(x_D * x_D, axis=0) / size + eps) * scale_D
    if HAS_GATE:
        place = gate_place(row, gate_stride, num_heads, repeats, group, first, size)
        gate_D = tl.load(gate_ptr + place + at_D, mask=is_in_D, other=0.0).to(tl.float32)
        y_D *= gate_D * tl.sigmoid(gate_D)
    tl.store(out_ptr + row * size + at_D, y_D.to(out_ptr.dtype.element_ty), mask=is_in_D)


@triton.jit
def rms_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    grad_ptr,
    grad_x_ptr,
    grad_gate_ptr,
    partial_ptr,
    row_stride,
    gate_stride,
    num_heads,
    repeats,
    group,
    first,
    size,
    num_rows,
    rows_each,
    eps,
    ZERO_CENTERED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`rows_each` rows of one program: gradients of x and gate, and the sum of those of the weight.

    The norm is computed again, so that x is read once and nothing is kept. `grad_gate` lies as the gate does.
    """
    begin = tl.program_id(0).to(tl.int64) * rows_each
    end = tl.minimum(begin + rows_each, num_rows)
    at_D = tl.arange(0, BLOCK)
    is_in_D = at_D < size
    scale_D = norm_scale(weight_ptr, at_D, is_in_D, ZERO_CENTERED)
    sum_D = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, rows_each, ROWS):
        row_R = begin + tile + tl.arange(0, ROWS)
        is_in_RD = (row_R < end)[:, None] & is_in_D[None, :]
        at_RD = row_R[:, None] * size + at_D[None, :]
        x_RD = tl.load(x_ptr + row_R[:, None] * row_stride + at_D[None, :], mask=is_in_RD, other=0.0).to(tl.float32)
        grad_RD = tl.load(grad_ptr + at_RD, mask=is_in_RD, other=0.0).to(tl.float32)
        inverse_R1 = (1.0 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / size + eps))[:, None]
        normed_RD = x_RD * inverse_R1
        if HAS_GATE:
            place_R = gate_place(row_R, gate_stride, num_heads, repeats, group, first, size)
            gate_at = place_R[:, None] + at_D[None, :]
            gate_RD = tl.load(gate_ptr + gate_at, mask=is_in_RD, other=0.0).to(tl.float32)
            sigmoid_RD = tl.sigmoid(gate_RD)
            slope_RD = sigmoid_RD * (1.0 + gate_RD * (1.0 - sigmoid_RD))
            grad_gate_RD = grad_RD * normed_RD * scale_D[None, :] * slope_RD
            tl.store(grad_gate_ptr + gate_at, grad_gate_RD.to(grad_gate_ptr.dtype.element_ty), mask=is_in_RD)
            grad_RD *= gate_RD * sigmoid_RD
        sum_D += tl.sum(grad_RD * normed_RD, axis=0)
        grad_RD *= scale_D[None, :]
        along_R1 = (tl.sum(grad_RD * normed_RD, axis=1) / size)[:, None]
        grad_x_RD = (grad_RD - normed_RD * along_R1) * inverse_R1
        tl.store(grad_x_ptr + at_RD, grad_x_RD.to(grad_x_ptr.dtype.element_ty), mask=is_in_RD)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * size + at_D, sum_D, mask=is_in_D)
