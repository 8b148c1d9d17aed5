"""Experts of few tokens: each matrix is read for one token at a time, as codes or as floats.

A program waits for memory as often as it goes round a loop, so it asks for much at a time: for gate and up together,
and for a piece of all experts of a token.

Legend: T tokens, A experts of a token, P = T * A assignments, R = A * F rows of matrices, D inputs, F outputs or expert
width, G groups of inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.codes import codes_at


@triton.jit
def products(
    row_ptr_R,
    is_row_R,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    expert_R,
    at_R,
    num_outputs,
    first,
    num_inputs,
    FORM: tl.constexpr,
):
    """Of each row of a matrix, output `at_R` of expert `expert_R`, the product with its own input, in fp32: over the
    inputs of a block, from `first`."""
    codes_RGD, scales_RG = codes_at(
        weight_ptr,
        scales_ptr,
        zeros_ptr,
        expert_R,
        at_R,
        first,
        num_outputs,
        num_inputs,
        FORM,
    )
    at_D = first + tl.arange(0, FORM[4])
    is_in_RD = is_row_R[:, None] & (at_D < num_inputs)[None, :]
    x_RD = tl.load(row_ptr_R[:, None] + at_D[None, :], mask=is_in_RD, other=0.0).to(tl.float32)
    x_RGD = tl.reshape(x_RD, codes_RGD.shape)
    return tl.sum(tl.sum(codes_RGD * x_RGD, axis=2) * scales_RG, axis=1)


@triton.jit
def gate_and_up(
    x_ptr,
    gate,
    up,
    expert,
    gate_at_F,
    up_at_F,
    num_outputs,
    num_inputs,
    FORM: tl.constexpr,
):
    """silu(gate x) * (up x) of one row; `gate` and `up` are the memory of matrices, which may be the same."""
    x_ptr_F, is_row_F = x_ptr + gate_at_F * 0, gate_at_F < num_outputs
    gate_F = tl.zeros(gate_at_F.shape, tl.float32)
    up_F = tl.zeros(gate_at_F.shape, tl.float32)
    expert_F = expert + gate_at_F * 0
    for first in range(0, num_inputs, FORM[4]):
        of_gate = (expert_F, gate_at_F, num_outputs, first, num_inputs)
        of_up = (expert_F, up_at_F, num_outputs, first, num_inputs)
        gate_F += products(x_ptr_F, is_row_F, *gate, *of_gate, FORM)
        up_F += products(x_ptr_F, is_row_F, *up, *of_up, FORM)
    return gate_F * tl.sigmoid(gate_F) * up_F


@triton.jit
def score_of(x_ptr, vector_ptr, num_inputs, BLOCK: tl.constexpr):
    """sigmoid of the product of two vectors."""
    sum_D = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_inputs, BLOCK):
        at_D = first + tl.arange(0, BLOCK)
        x_D = tl.load(x_ptr + at_D, mask=at_D < num_inputs, other=0.0).to(tl.float32)
        sum_D += x_D * tl.load(vector_ptr + at_D, mask=at_D < num_inputs, other=0.0).to(tl.float32)
    return tl.sigmoid(tl.sum(sum_D, axis=0))


@triton.jit
def experts_inner_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    experts_ptr,
    inner_ptr,
    shared_gate_ptr,
    shared_gate_scales_ptr,
    shared_gate_zeros_ptr,
    shared_up_ptr,
    shared_up_scales_ptr,
    shared_up_zeros_ptr,
    shared_scale_ptr,
    shared_inner_ptr,
    x_stride,
    top_k,
    num_assignments,
    width,
    shared_width,
    num_inputs,
    num_experts,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SHARED_SCALE: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """silu(gate x) * (up x) of one assignment, some of its width; NaN for an expert that does not exist.

    Behind the assignments come the tokens themselves, with the shared expert: what scales it is in its inner numbers.
    ROUTED and SHARED are the forms of the matrices; SHARED may be None.
    """
    p = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if p < num_assignments:
        expert = tl.load(experts_ptr + p)
        is_expert = (expert >= 0) & (expert < num_experts)
        expert = tl.where(is_expert, expert, 0)
        weight = (weight_ptr, scales_ptr, zeros_ptr)
        is_in_F = at_F < width
        outputs_F = tl.where(is_in_F, at_F, 2 * width)  # the rows behind gate are those of up
        outputs = (expert, outputs_F, width + at_F, 2 * width, num_inputs)
        inner_F = gate_and_up(x_ptr + p // top_k * x_stride, weight, weight, *outputs, ROUTED)
        tl.store(inner_ptr + p * width + at_F, tl.where(is_expert, inner_F, float("nan")), mask=is_in_F)
    else:
        if SHARED is not None:
            t = p - num_assignments
            row_ptr = x_ptr + t * x_stride
            gate = (shared_gate_ptr, shared_gate_scales_ptr, shared_gate_zeros_ptr)
            up = (shared_up_ptr, shared_up_scales_ptr, shared_up_zeros_ptr)
            inner_F = gate_and_up(row_ptr, gate, up, t * 0, at_F, at_F, shared_width, num_inputs, SHARED)
            if HAS_SHARED_SCALE:
                inner_F *= score_of(row_ptr, shared_scale_ptr, num_inputs, 1024)
            tl.store(shared_inner_ptr + t * shared_width + at_F, inner_F, mask=at_F < shared_width)


@triton.jit
def experts_output_kernel(
    inner_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    experts_ptr,
    routing_ptr,
    shared_inner_ptr,
    shared_ptr,
    shared_scales_ptr,
    shared_zeros_ptr,
    residual_ptr,
    out_ptr,
    residual_stride,
    top_k,
    width,
    shared_width,
    num_outputs,
    num_experts,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Of one token some outputs: its experts, then the shared one and the residual where there are such."""
    t = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_in_F = at_F < num_outputs
    at_R = tl.arange(0, BLOCK_A * BLOCK_F)
    a_R, output_R = at_R // BLOCK_F, tl.program_id(1) * BLOCK_F + at_R % BLOCK_F
    p_R, is_row_R = t * top_k + a_R, (a_R < top_k) & (output_R < num_outputs)
    expert_R = tl.load(experts_ptr + p_R, mask=is_row_R, other=0)
    expert_R = tl.where((expert_R >= 0) & (expert_R < num_experts), expert_R, 0)  # its inner numbers are NaN
    output_R = tl.where(is_row_R, output_R, num_outputs)  # which reads nothing
    y_R = tl.zeros(at_R.shape, tl.float32)
    for first in range(0, width, ROUTED[4]):
        weight = (weight_ptr, scales_ptr, zeros_ptr, expert_R, output_R, num_outputs, first, width)
        y_R += products(inner_ptr + p_R * width, is_row_R, *weight, ROUTED)
    y_R *= tl.load(routing_ptr + p_R, mask=is_row_R, other=0.0)
    y_F = tl.sum(tl.reshape(y_R, [BLOCK_A, BLOCK_F]), axis=0)
    if SHARED is not None:
        for first in range(0, shared_width, SHARED[4]):
            weight = (shared_ptr, shared_scales_ptr, shared_zeros_ptr, at_F * 0, at_F, num_outputs, first, shared_width)
            y_F += products(shared_inner_ptr + t * shared_width + at_F * 0, is_in_F, *weight, SHARED)
    if HAS_RESIDUAL:
        y_F += tl.load(residual_ptr + t * residual_stride + at_F, mask=is_in_F, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * num_outputs + at_F, y_F.to(out_ptr.dtype.element_ty), mask=is_in_F)
