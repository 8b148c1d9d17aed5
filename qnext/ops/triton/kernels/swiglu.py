"""silu(gate) * up of rows, times a weight of the row where there is one, and the gradients. Legend: F width."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(
    gate_ptr,
    up_ptr,
    weights_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    width,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some numbers of one row."""
    row, at_F = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in_F = at_F < width
    gate_F = tl.load(gate_ptr + row * gate_stride + at_F, mask=is_in_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + at_F, mask=is_in_F, other=0.0).to(tl.float32)
    y_F = gate_F * tl.sigmoid(gate_F) * up_F
    if HAS_WEIGHTS:
        y_F *= tl.load(weights_ptr + row)
    tl.store(out_ptr + row * width + at_F, y_F.to(out_ptr.dtype.element_ty), mask=is_in_F)


@triton.jit
def swiglu_backward_kernel(
    gate_ptr,
    up_ptr,
    weights_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_weights_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    grad_stride,
    width,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: gradients of gate and up; with weights also that of the weight, and the result of the row again."""
    row = tl.program_id(0).to(tl.int64)
    weight, sum_F = 1.0, tl.zeros([BLOCK], tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row)
    for first in range(0, width, BLOCK):
        at_F = first + tl.arange(0, BLOCK)
        is_in_F = at_F < width
        gate_F = tl.load(gate_ptr + row * gate_stride + at_F, mask=is_in_F, other=0.0).to(tl.float32)
        up_F = tl.load(up_ptr + row * up_stride + at_F, mask=is_in_F, other=0.0).to(tl.float32)
        grad_F = tl.load(grad_ptr + row * width + at_F, mask=is_in_F, other=0.0).to(tl.float32)
        sigmoid_F = tl.sigmoid(gate_F)
        active_F = gate_F * sigmoid_F
        if HAS_WEIGHTS:
            inner_F = active_F * up_F
            sum_F += grad_F * inner_F
            tl.store(out_ptr + row * width + at_F, (inner_F * weight).to(out_ptr.dtype.element_ty), mask=is_in_F)
            grad_F *= weight
        to, slope_F = row * grad_stride + at_F, grad_F * up_F * sigmoid_F * (1.0 + gate_F * (1.0 - sigmoid_F))
        tl.store(grad_gate_ptr + to, slope_F.to(grad_gate_ptr.dtype.element_ty), mask=is_in_F)
        tl.store(grad_up_ptr + to, (grad_F * active_F).to(grad_up_ptr.dtype.element_ty), mask=is_in_F)
    if HAS_WEIGHTS:
        tl.store(grad_weights_ptr + row, tl.sum(sum_F, axis=0))
