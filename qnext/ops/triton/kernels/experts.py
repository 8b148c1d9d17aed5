"""Experts of few tokens: each matrix is read for one token at a time, as codes or as floats.

Legend: T tokens, A experts of a token, P = T * A assignments, D inputs, F outputs or expert width, G groups of inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.codes import codes_at


@triton.jit
def products(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    expert,
    at_F,
    num_outputs,
    num_inputs,
    FORM: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """W x of some outputs for one row, in fp32."""
    y_F = tl.zeros(at_F.shape, tl.float32)
    for first in range(0, num_inputs, BLOCK_D):
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
        x_D = tl.load(x_ptr + at_D, mask=at_D < num_inputs, other=0.0).to(tl.float32)
        x_1GD = tl.reshape(x_D, [1, BLOCK_D // GROUP, GROUP])
        y_F += tl.sum(tl.sum(codes_FGD * x_1GD, axis=2) * scales_FG, axis=1)
    return y_F


@triton.jit
def experts_inner_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    experts_ptr,
    inner_ptr,
    x_stride,
    top_k,
    width,
    num_inputs,
    num_experts,
    FORM: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """silu(gate x) * (up x) of one assignment, some of its width; NaN for an expert that does not exist."""
    p = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    expert = tl.load(experts_ptr + p)
    is_expert = (expert >= 0) & (expert < num_experts)
    expert = tl.where(is_expert, expert, 0)
    x_ptr += p // top_k * x_stride
    weight = (weight_ptr, scales_ptr, zeros_ptr, expert)
    is_in_F = at_F < width
    outputs_F = tl.where(is_in_F, at_F, 2 * width)  # the rows behind gate are those of up
    gate_F = products(x_ptr, *weight, outputs_F, 2 * width, num_inputs, FORM, HAS_ZEROS, SCALE_ROWS, GROUP, BLOCK_D)
    up_F = products(x_ptr, *weight, width + at_F, 2 * width, num_inputs, FORM, HAS_ZEROS, SCALE_ROWS, GROUP, BLOCK_D)
    inner_F = tl.where(is_expert, gate_F * tl.sigmoid(gate_F) * up_F, float("nan"))
    tl.store(inner_ptr + p * width + at_F, inner_F, mask=is_in_F)


@triton.jit
def experts_output_kernel(
    inner_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    experts_ptr,
    routing_ptr,
    shared_ptr,
    shared_gate_ptr,
    out_ptr,
    top_k,
    width,
    num_outputs,
    num_experts,
    FORM: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_SHARED_GATE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of one token some outputs: its experts in the order of the routing, then the shared one."""
    t = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_in_F = at_F < num_outputs
    y_F = tl.zeros([BLOCK_F], tl.float32)
    for a in range(top_k):
        p = t * top_k + a
        expert = tl.load(experts_ptr + p)
        expert = tl.where((expert >= 0) & (expert < num_experts), expert, 0)  # its inner numbers are NaN
        weight = (weight_ptr, scales_ptr, zeros_ptr, expert)
        part_F = products(
            inner_ptr + p * width, *weight, at_F, num_outputs, width, FORM, HAS_ZEROS, SCALE_ROWS, GROUP, BLOCK_D
        )
        y_F += tl.load(routing_ptr + p) * part_F
    if HAS_SHARED:
        shared_F = tl.load(shared_ptr + t * num_outputs + at_F, mask=is_in_F, other=0.0).to(tl.float32)
        if HAS_SHARED_GATE:
            shared_F *= tl.sigmoid(tl.load(shared_gate_ptr + t).to(tl.float32))
        y_F += shared_F
    tl.store(out_ptr + t * num_outputs + at_F, y_F.to(out_ptr.dtype.element_ty), mask=is_in_F)
