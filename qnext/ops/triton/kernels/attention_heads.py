"""What stands around attention in training: norms and rotations of heads, and the output gate, with their gradients.

One program takes some tokens of a head. Legend: T tokens, K head dim; a rotated dim has its partner half of R away.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.norm import norm_scale


@triton.jit
def partner_of(at_K, half):
    """The dim that a rotation mixes with each dim, the sign of its part, and the place of the angle; 0 for the rest."""
    is_first, is_second = at_K < half, (at_K >= half) & (at_K < 2 * half)
    partner_K = tl.where(is_first, at_K + half, tl.where(is_second, at_K - half, at_K))
    return partner_K, tl.where(is_first, -1.0, tl.where(is_second, 1.0, 0.0)), tl.where(is_first, at_K, at_K - half)


@triton.jit
def heads_kernel(
    x_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_stride,
    head_stride,
    num_tokens,
    num_heads,
    head_dim,
    half,
    eps,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Heads of queries or keys, normalised and rotated, one after another."""
    row_T, h = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1)
    at_K = tl.arange(0, BLOCK_K)
    is_in_K = at_K < head_dim
    is_in_TK = (row_T < num_tokens)[:, None] & is_in_K[None, :]
    partner_K, sign_K, angle_K = partner_of(at_K, half)
    x_ptrs = x_ptr + row_T[:, None] * token_stride + h * head_stride
    x_TK = tl.load(x_ptrs + at_K[None, :], mask=is_in_TK, other=0.0).to(tl.float32)
    other_TK = tl.load(x_ptrs + partner_K[None, :], mask=is_in_TK, other=0.0).to(tl.float32)
    inverse_T1 = (1.0 / tl.sqrt(tl.sum(x_TK * x_TK, axis=1) / head_dim + eps))[:, None]
    angle_at, is_turned_TK = row_T[:, None] * half + angle_K[None, :], is_in_TK & (sign_K != 0.0)[None, :]
    cos_TK = tl.load(cos_ptr + angle_at, mask=is_turned_TK, other=1.0)
    sin_TK = tl.load(sin_ptr + angle_at, mask=is_turned_TK, other=0.0) * sign_K[None, :]
    y_TK = x_TK * norm_scale(norm_ptr, at_K, is_in_K, ZERO_CENTERED)[None, :] * cos_TK
    y_TK += other_TK * norm_scale(norm_ptr, partner_K, is_in_K, ZERO_CENTERED)[None, :] * sin_TK
    out_at = (row_T[:, None] * num_heads + h) * head_dim + at_K[None, :]
    tl.store(out_ptr + out_at, (y_TK * inverse_T1).to(out_ptr.dtype.element_ty), mask=is_in_TK)


@triton.jit
def heads_backward_kernel(
    x_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_x_ptr,
    partial_ptr,
    token_stride,
    head_stride,
    num_tokens,
    tokens_each,
    num_heads,
    head_dim,
    half,
    eps,
    ZERO_CENTERED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`tokens_each` tokens of one head: gradients of its dims and of its gate, and the sum of those of the norm."""
    part, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_K = tl.arange(0, BLOCK_K)
    is_in_K = at_K < head_dim
    partner_K, sign_K, angle_K = partner_of(at_K, half)
    scale_K, sum_K = norm_scale(norm_ptr, at_K, is_in_K, ZERO_CENTERED), tl.zeros([BLOCK_K], tl.float32)
    end = tl.minimum((part + 1) * tokens_each, num_tokens)
    for tile in range(0, tokens_each, BLOCK_T):
        row_T = part * tokens_each + tile + tl.arange(0, BLOCK_T)
        is_in_TK = (row_T < end)[:, None] & is_in_K[None, :]
        x_at = row_T[:, None] * token_stride + h * head_stride + at_K[None, :]
        x_TK = tl.load(x_ptr + x_at, mask=is_in_TK, other=0.0).to(tl.float32)
        inverse_T1 = (1.0 / tl.sqrt(tl.sum(x_TK * x_TK, axis=1) / head_dim + eps))[:, None]
        normed_TK = x_TK * inverse_T1
        head_at = (row_T[:, None] * num_heads + h) * head_dim
        grad_TK = tl.load(grad_ptr + head_at + at_K[None, :], mask=is_in_TK, other=0.0).to(tl.float32)
        other_TK = tl.load(grad_ptr + head_at + partner_K[None, :], mask=is_in_TK, other=0.0).to(tl.float32)
        angle_at, is_turned_TK = row_T[:, None] * half + angle_K[None, :], is_in_TK & (sign_K != 0.0)[None, :]
        grad_TK *= tl.load(cos_ptr + angle_at, mask=is_turned_TK, other=1.0)
        grad_TK -= other_TK * sign_K[None, :] * tl.load(sin_ptr + angle_at, mask=is_turned_TK, other=0.0)
        sum_K += tl.sum(grad_TK * normed_TK, axis=0)
        grad_TK *= scale_K[None, :]
        grad_TK = (grad_TK - normed_TK * (tl.sum(grad_TK * normed_TK, axis=1) / head_dim)[:, None]) * inverse_T1
        tl.store(grad_x_ptr + x_at, grad_TK.to(grad_x_ptr.dtype.element_ty), mask=is_in_TK)
        if HAS_GATE:
            gate_TK = tl.load(grad_gate_ptr + head_at + at_K[None, :], mask=is_in_TK, other=0.0)
            tl.store(grad_x_ptr + x_at + head_dim, gate_TK.to(grad_x_ptr.dtype.element_ty), mask=is_in_TK)
    tl.store(partial_ptr + (part * num_heads + h) * head_dim + at_K, sum_K, mask=is_in_K)


@triton.jit
def output_gate_kernel(
    x_ptr,
    gate_ptr,
    grad_ptr,
    out_ptr,
    grad_gate_ptr,
    token_stride,
    head_stride,
    num_rows,
    num_heads,
    head_dim,
    IS_BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of heads times sigmoid of their gates; or the gradients of both."""
    row_R, at_K = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    is_in_RK = (row_R < num_rows)[:, None] & (at_K < head_dim)[None, :]
    gate_at = (row_R // num_heads * token_stride + row_R % num_heads * head_stride)[:, None] + at_K[None, :]
    at_RK = row_R[:, None] * head_dim + at_K[None, :]
    x_RK = tl.load(x_ptr + at_RK, mask=is_in_RK, other=0.0).to(tl.float32)
    sigmoid_RK = tl.sigmoid(tl.load(gate_ptr + gate_at, mask=is_in_RK, other=0.0).to(tl.float32))
    if IS_BACKWARD:
        grad_RK = tl.load(grad_ptr + at_RK, mask=is_in_RK, other=0.0).to(tl.float32)
        grad_gate_RK = grad_RK * x_RK * sigmoid_RK * (1.0 - sigmoid_RK)
        tl.store(grad_gate_ptr + at_RK, grad_gate_RK.to(grad_gate_ptr.dtype.element_ty), mask=is_in_RK)
        x_RK = grad_RK
    tl.store(out_ptr + at_RK, (x_RK * sigmoid_RK).to(out_ptr.dtype.element_ty), mask=is_in_RK)
