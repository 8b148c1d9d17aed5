"""Angles of positions. Legend: R rotated dims."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rope_kernel(positions_ptr, frequencies_ptr, cos_ptr, sin_ptr, factor, half, BLOCK: tl.constexpr):
    """cos and sin [R / 2] of one token. The product of a position and a frequency is exact in fp64."""
    t, at_R = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_in_R = at_R < half
    angle_R = tl.load(frequencies_ptr + at_R, mask=is_in_R, other=0.0).to(tl.float64)
    angle_R *= tl.load(positions_ptr + t).to(tl.float64)
    tl.store(cos_ptr + t * half + at_R, (tl.cos(angle_R) * factor).to(tl.float32), mask=is_in_R)
    tl.store(sin_ptr + t * half + at_R, (tl.sin(angle_R) * factor).to(tl.float32), mask=is_in_R)
