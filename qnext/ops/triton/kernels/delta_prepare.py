"""From the projections of Gated DeltaNet to the inputs of the delta rule, and back: convolution, silu, norms, gates.

One program takes some tokens of a head of q, k or v. The intermediate sums of the convolution exist in no memory.
Legend: T tokens, C channels of a head, J key heads, W width of the convolution; offsets count from a sequence's start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.delta_inputs import softplus


@triton.jit
def place_of(c, num_key_heads, num_heads, key_dim, value_dim):
    """Of head `c` among all of q, k and v: its channels, its columns of the projection, its dims, and its kind."""
    repeats = num_heads // num_key_heads
    is_value, h = c >= 2 * num_key_heads, c - 2 * num_key_heads
    j = tl.where(is_value, h // repeats, c % num_key_heads)
    channel = tl.where(is_value, 2 * num_key_heads * key_dim + h * value_dim, c * key_dim)
    is_key = (c >= num_key_heads) & (c < 2 * num_key_heads)
    inner = tl.where(is_value, 2 * key_dim + (h % repeats) * value_dim, tl.where(is_key, key_dim, 0))
    return (
        channel,
        j * (2 * key_dim + 2 * repeats * value_dim) + inner,
        tl.where(is_value, value_dim, key_dim),
        is_value,
    )


@triton.jit
def convolved(row_T, offset_T, is_in_T, x_ptr, x_stride, taps_ptr, at_C, is_in_C, WIDTH: tl.constexpr):
    """The sum before silu of some tokens [T, C]; zeros stand before a sequence."""
    y_TC = tl.zeros([row_T.shape[0], at_C.shape[0]], tl.float32)
    for tap in tl.static_range(WIDTH):
        back = WIDTH - 1 - tap
        is_there_TC = (is_in_T & (offset_T >= back))[:, None] & is_in_C[None, :]
        x_TC = tl.load(x_ptr + (row_T - back)[:, None] * x_stride + at_C[None, :], mask=is_there_TC, other=0.0)
        y_TC += x_TC.to(tl.float32) * tl.load(taps_ptr + at_C * WIDTH + tap, mask=is_in_C, other=0.0).to(tl.float32)
    return y_TC


@triton.jit
def gate_at(c, num_key_heads, num_heads):
    """Of a value head: its number, and the place of its b in a row; that of a lies `repeats` behind."""
    repeats, h = num_heads // num_key_heads, c - 2 * num_key_heads
    return h, h // repeats * 2 * repeats + h % repeats, repeats


@triton.jit
def gates_of(ba_ptrs, repeats, A_log_ptr, dt_bias_ptr, is_in_T):
    """b and a of some tokens, and A and the bias of their head."""
    b_T = tl.load(ba_ptrs, mask=is_in_T, other=0.0).to(tl.float32)
    a_T = tl.load(ba_ptrs + repeats, mask=is_in_T, other=0.0).to(tl.float32)
    return b_T, a_T, tl.exp(tl.load(A_log_ptr).to(tl.float32)), tl.load(dt_bias_ptr).to(tl.float32)


@triton.jit
def delta_prepare_kernel(
    qkvz_ptr,
    ba_ptr,
    conv_weight_ptr,
    A_log_ptr,
    dt_bias_ptr,
    offsets_ptr,
    sequences_ptr,
    left_ptr,
    mixed_ptr,
    g_ptr,
    beta_ptr,
    qkvz_stride,
    ba_stride,
    num_tokens,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    num_channels,
    HAS_LEFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Some tokens of one head: normalised q or k, or v and its gates."""
    c = tl.program_id(1)
    channel, column, dim, is_value = place_of(c, num_key_heads, num_heads, key_dim, value_dim)
    row_T, at_C = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    is_in_T, is_in_C = row_T < num_tokens, at_C < dim
    offset_T = tl.load(offsets_ptr + row_T, mask=is_in_T, other=0)
    taps_ptr = conv_weight_ptr + channel * WIDTH
    y_TC = convolved(row_T, offset_T, is_in_T, qkvz_ptr + column, qkvz_stride, taps_ptr, at_C, is_in_C, WIDTH)
    if HAS_LEFT:
        before_T = tl.load(sequences_ptr + row_T, mask=is_in_T, other=0) * (WIDTH - 1) + offset_T
        for tap in tl.static_range(WIDTH - 1):
            is_left_TC = (is_in_T & (offset_T + tap < WIDTH - 1))[:, None] & is_in_C[None, :]
            left_at = left_ptr + (before_T + tap)[:, None] * num_channels + channel + at_C[None, :]
            tap_C = tl.load(taps_ptr + at_C * WIDTH + tap, mask=is_in_C, other=0.0).to(tl.float32)
            y_TC += tl.load(left_at, mask=is_left_TC, other=0.0) * tap_C[None, :]
    y_TC *= tl.sigmoid(y_TC)
    if is_value == 0:
        y_TC /= tl.sqrt(tl.sum(y_TC * y_TC, axis=1) + 1e-6)[:, None]
    mixed_at = mixed_ptr + row_T[:, None] * num_channels + channel + at_C[None, :]
    tl.store(mixed_at, y_TC, mask=is_in_T[:, None] & is_in_C[None, :])
    if is_value:
        h, b_at, repeats = gate_at(c, num_key_heads, num_heads)
        ba_ptrs = ba_ptr + row_T * ba_stride + b_at
        b_T, a_T, A, dt_bias = gates_of(ba_ptrs, repeats, A_log_ptr + h, dt_bias_ptr + h, is_in_T)
        tl.store(beta_ptr + row_T * num_heads + h, tl.sigmoid(b_T), mask=is_in_T)
        tl.store(g_ptr + row_T * num_heads + h, -A * softplus(a_T + dt_bias), mask=is_in_T)


@triton.jit
def slope_of_input(
    row_T,
    offset_T,
    is_in_T,
    x_ptr,
    x_stride,
    taps_ptr,
    grad_ptr,
    grad_stride,
    at_C,
    is_in_C,
    is_value,
    WIDTH: tl.constexpr,
):
    """The gradient of the sum before silu of some tokens [T, C]; zero where there is none."""
    y_TC = convolved(row_T, offset_T, is_in_T, x_ptr, x_stride, taps_ptr, at_C, is_in_C, WIDTH)
    sigmoid_TC = tl.sigmoid(y_TC)
    is_in_TC = is_in_T[:, None] & is_in_C[None, :]
    grad_TC = tl.load(grad_ptr + row_T[:, None] * grad_stride + at_C[None, :], mask=is_in_TC, other=0.0)
    if is_value == 0:
        normed_TC = y_TC * sigmoid_TC
        squares_T = tl.sum(normed_TC * normed_TC, axis=1)
        inverse_T1 = tl.where(squares_T > 0.0, 1.0 / tl.sqrt(squares_T + 1e-6), 0.0)[:, None]
        normed_TC *= inverse_T1
        grad_TC = (grad_TC - normed_TC * tl.sum(grad_TC * normed_TC, axis=1)[:, None]) * inverse_T1
    return grad_TC * sigmoid_TC * (1.0 + y_TC * (1.0 - sigmoid_TC))


@triton.jit
def delta_prepare_backward_kernel(
    qkvz_ptr,
    ba_ptr,
    conv_weight_ptr,
    A_log_ptr,
    dt_bias_ptr,
    offsets_ptr,
    lengths_ptr,
    grad_mixed_ptr,
    grad_g_ptr,
    grad_beta_ptr,
    grad_qkvz_ptr,
    grad_ba_ptr,
    partial_taps_ptr,
    partial_gates_ptr,
    qkvz_stride,
    ba_stride,
    num_tokens,
    tokens_each,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    num_channels,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """`tokens_each` tokens of one head: gradients of its columns and gates, and sums of those of its parameters.

    The gradient of a token's input reads that of the sums of the next W - 1 tokens, which are computed again here.
    """
    part, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, column, dim, is_value = place_of(c, num_key_heads, num_heads, key_dim, value_dim)
    at_C, at_W = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    is_in_C = at_C < dim
    taps_ptr = conv_weight_ptr + channel * WIDTH
    x_ptr, grad_ptr = qkvz_ptr + column, grad_mixed_ptr + channel
    taps_WC = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    dA, dbias = 0.0, 0.0
    end = tl.minimum((part + 1) * tokens_each, num_tokens)
    for tile in range(0, tokens_each, BLOCK_T):
        row_T = part * tokens_each + tile + tl.arange(0, BLOCK_T)
        is_in_T = row_T < end
        offset_T = tl.load(offsets_ptr + row_T, mask=is_in_T, other=0)
        behind_T = tl.load(lengths_ptr + row_T, mask=is_in_T, other=0) - offset_T  # tokens from here to the end
        at_TC, is_in_TC = row_T[:, None] * qkvz_stride + at_C[None, :], is_in_T[:, None] & is_in_C[None, :]
        grad_x_TC = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for back in tl.static_range(WIDTH):
            slope_TC = slope_of_input(
                row_T + back,
                offset_T + back,
                is_in_T & (behind_T > back),
                x_ptr,
                qkvz_stride,
                taps_ptr,
                grad_ptr,
                num_channels,
                at_C,
                is_in_C,
                is_value,
                WIDTH,
            )
            tap_C = tl.load(taps_ptr + at_C * WIDTH + (WIDTH - 1 - back), mask=is_in_C, other=0.0).to(tl.float32)
            grad_x_TC += slope_TC * tap_C[None, :]
            x_TC = tl.load(x_ptr + at_TC, mask=is_in_TC, other=0.0).to(tl.float32)
            taps_WC += tl.where((at_W == WIDTH - 1 - back)[:, None], tl.sum(slope_TC * x_TC, axis=0)[None, :], 0.0)
        grad_x_TC = grad_x_TC.to(grad_qkvz_ptr.dtype.element_ty)
        tl.store(grad_qkvz_ptr + column + at_TC, grad_x_TC, mask=is_in_TC)
        if is_value:
            h, b_at, repeats = gate_at(c, num_key_heads, num_heads)
            ba_at, gate_T = row_T * ba_stride + b_at, row_T * num_heads + h
            b_T, a_T, A, dt_bias = gates_of(ba_ptr + ba_at, repeats, A_log_ptr + h, dt_bias_ptr + h, is_in_T)
            grad_g_T = tl.load(grad_g_ptr + gate_T, mask=is_in_T, other=0.0) * -A
            dA += tl.sum(grad_g_T * softplus(a_T + dt_bias), axis=0)
            beta_T, grad_a_T = tl.sigmoid(b_T), grad_g_T * tl.sigmoid(a_T + dt_bias)
            dbias += tl.sum(grad_a_T, axis=0)
            grad_b_T = tl.load(grad_beta_ptr + gate_T, mask=is_in_T, other=0.0) * beta_T * (1.0 - beta_T)
            tl.store(grad_ba_ptr + ba_at, grad_b_T.to(grad_ba_ptr.dtype.element_ty), mask=is_in_T)
            tl.store(grad_ba_ptr + ba_at + repeats, grad_a_T.to(grad_ba_ptr.dtype.element_ty), mask=is_in_T)
    at = partial_taps_ptr + (part * num_channels + channel + at_C[None, :]) * WIDTH + at_W[:, None]
    tl.store(at, taps_WC, mask=(at_W < WIDTH)[:, None] & is_in_C[None, :])
    if is_value:
        sum_at = partial_gates_ptr + part * 2 * num_heads + c - 2 * num_key_heads
        tl.store(sum_at, dA)
        tl.store(sum_at + num_heads, dbias)
