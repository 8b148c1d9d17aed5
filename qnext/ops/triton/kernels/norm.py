"""RMSNorm of rows, with a gate or without. One program computes a row. Legend: D the normalised dim."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    out_ptr,
    row_stride,
    gate_stride,
    size,
    eps,
    ZERO_CENTERED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at_D = tl.arange(0, BLOCK)
    is_in_D = at_D < size
    x_D = tl.load(x_ptr + row * row_stride + at_D, mask=is_in_D, other=0.0).to(tl.float32)
    scale_D = tl.load(weight_ptr + at_D, mask=is_in_D, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        scale_D += 1.0
    y_D = x_D / tl.sqrt(tl.sum(x_D * x_D, axis=0) / size + eps) * scale_D
    if HAS_GATE:
        gate_D = tl.load(gate_ptr + row * gate_stride + at_D, mask=is_in_D, other=0.0).to(tl.float32)
        y_D *= gate_D * tl.sigmoid(gate_D)
    tl.store(out_ptr + row * size + at_D, y_D.to(out_ptr.dtype.element_ty), mask=is_in_D)
