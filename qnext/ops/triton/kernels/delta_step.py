"""A few tokens of Gated DeltaNet in two launches: first the state, by blocks of a head's values, then whole heads.

The second one norms the outputs, and writes what the programs of the first one share and read.

A sequence's inputs of the convolution are numbered through: the W - 1 carried ones, then the accepted pending tokens,
then the tokens of the call. Legend: N sequences, J key heads, H value heads, K and V key and value head dims, C the
channels of the convolution, W its width, L drafted tokens at most, S the state of a head [K, V].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)). Small exp(x) take the series of 2 artanh(y / (2 + y)): the logarithm of 1.001 has few digits."""
    y = tl.exp(tl.minimum(x, 20.0))
    s = y / (2.0 + y)
    squared = s * s
    series = 2.0 * s * (1.0 + squared * (1.0 / 3.0 + squared * (0.2 + squared * (1.0 / 7.0))))
    return tl.where(x > 20.0, x, tl.where(y < 0.25, series, tl.log(1.0 + y)))


@triton.jit
def input_at(
    place,
    channel,
    column,
    is_in,
    slot,
    start,
    count,
    is_fresh,
    conv_ptr,
    pending_ptr,
    qkvz_ptr,
    qkvz_stride,
    num_channels,
    num_drafts,
    WIDTH: tl.constexpr,
    HAS_PENDING: tl.constexpr,
):
    """The input of the convolution at a place; `channel` counts in slots, `column` in the rows of the projection."""
    behind = place - (WIDTH - 1)
    is_carried = is_in & (behind < 0) & (is_fresh == 0)
    x = tl.load(conv_ptr + (slot * (WIDTH - 1) + place) * num_channels + channel, mask=is_carried, other=0.0)
    if HAS_PENDING:
        is_pending = is_in & (behind >= 0) & (behind < count)
        at = pending_ptr + (slot * num_drafts + behind) * num_channels + channel
        x += tl.load(at, mask=is_pending, other=0.0)
    is_new = is_in & (behind >= 0) & (behind >= count)
    return x + tl.load(qkvz_ptr + (start + behind - count) * qkvz_stride + column, mask=is_new, other=0.0).to(
        tl.float32
    )


@triton.jit
def mixed_at(
    token,
    channel,
    column,
    is_in,
    slot,
    start,
    count,
    is_fresh,
    conv_ptr,
    pending_ptr,
    qkvz_ptr,
    conv_weight_ptr,
    qkvz_stride,
    num_channels,
    num_drafts,
    WIDTH: tl.constexpr,
    HAS_PENDING: tl.constexpr,
):
    """silu of the convolution for a token of the call."""
    y = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(WIDTH):
        x = input_at(
            count + token + tap,
            channel,
            column,
            is_in,
            slot,
            start,
            count,
            is_fresh,
            conv_ptr,
            pending_ptr,
            qkvz_ptr,
            qkvz_stride,
            num_channels,
            num_drafts,
            WIDTH,
            HAS_PENDING,
        )
        y += x * tl.load(conv_weight_ptr + channel * WIDTH + tap, mask=is_in, other=0.0).to(tl.float32)
    return y * tl.sigmoid(y)


@triton.jit
def l2_normed(x):
    return x / tl.sqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit
def slot_of(n, slots_ptr, is_fresh_ptr, is_draft_ptr, num_slots, HAS_FRESH: tl.constexpr, HAS_DRAFT: tl.constexpr):
    """The slot of a sequence, and whether it exists, begins here and drafts; one that does not exist is fresh."""
    slot = tl.load(slots_ptr + n)
    is_slot = (slot >= 0) & (slot < num_slots)
    is_fresh = ((tl.load(is_fresh_ptr + n) != 0) & HAS_FRESH) | (is_slot == 0)
    is_draft = (tl.load(is_draft_ptr + n) != 0) & HAS_DRAFT & is_slot
    return tl.where(is_slot, slot, 0), is_slot, is_fresh, is_draft


@triton.jit
def delta_step_kernel(
    qkvz_ptr,
    ba_ptr,
    conv_weight_ptr,
    A_log_ptr,
    dt_bias_ptr,
    starts_ptr,
    slots_ptr,
    is_fresh_ptr,
    is_draft_ptr,
    conv_ptr,
    state_ptr,
    pending_conv_ptr,
    pending_k_ptr,
    pending_u_ptr,
    pending_decay_ptr,
    num_accepted_ptr,
    o_ptr,
    qkvz_stride,
    ba_stride,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    num_channels,
    num_drafts,
    num_slots,
    WIDTH: tl.constexpr,
    HAS_FRESH: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    HAS_BF16_STATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some values of one head of one sequence: their outputs before the norm, their state, and u of drafts.

    A slot that does not exist is neither read nor written, and the outputs are NaN.
    """
    n, h = tl.program_id(0), tl.program_id(1)
    repeats = num_heads // num_key_heads
    j, r = h // repeats, h % repeats
    start = tl.load(starts_ptr + n)
    length = (tl.load(starts_ptr + n + 1) - start).to(tl.int32)
    slot, is_slot, is_fresh, is_draft = slot_of(
        n, slots_ptr, is_fresh_ptr, is_draft_ptr, num_slots, HAS_FRESH, HAS_DRAFT
    )
    at_K, at_V = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_in_K, is_in_V = at_K < key_dim, at_V < value_dim
    state_at = state_ptr + (slot * num_heads + h) * key_dim * value_dim + at_K[:, None] * value_dim + at_V[None, :]
    is_in_KV = is_in_K[:, None] & is_in_V[None, :]
    S = tl.load(state_at, mask=is_in_KV & (is_fresh == 0), other=0.0).to(tl.float32)
    count = 0
    if HAS_PENDING:
        count = tl.where(is_fresh, 0, tl.minimum(tl.load(num_accepted_ptr + slot), num_drafts)).to(tl.int32)
        for t in range(count):
            row = slot * num_drafts + t
            k_K = tl.load(pending_k_ptr + (row * num_key_heads + j) * key_dim + at_K, mask=is_in_K, other=0.0)
            u_V = tl.load(pending_u_ptr + (row * num_heads + h) * value_dim + at_V, mask=is_in_V, other=0.0)
            S = tl.load(pending_decay_ptr + row * num_heads + h) * S + k_K[:, None] * u_V[None, :]
            if HAS_BF16_STATE:
                S = S.to(tl.bfloat16).to(tl.float32)
        tl.debug_barrier()  # a thread may not write a draft where another still reads an accepted one
    if HAS_DRAFT:
        tl.store(state_at, S.to(state_ptr.dtype.element_ty), mask=is_in_KV & is_draft)
    group, key_width = j * (num_channels // num_key_heads + repeats * value_dim), num_key_heads * key_dim
    v_column_V = group + 2 * key_dim + r * value_dim + at_V
    carried = (slot, start, count, is_fresh, conv_ptr, pending_conv_ptr, qkvz_ptr, conv_weight_ptr)
    sizes = (qkvz_stride, num_channels, num_drafts)
    A = tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
    dt_bias = tl.load(dt_bias_ptr + h).to(tl.float32)
    for t in range(length):
        q_K = l2_normed(mixed_at(t, j * key_dim + at_K, group + at_K, is_in_K, *carried, *sizes, WIDTH, HAS_PENDING))
        k_K = l2_normed(
            mixed_at(
                t, key_width + j * key_dim + at_K, group + key_dim + at_K, is_in_K, *carried, *sizes, WIDTH, HAS_PENDING
            )
        )
        v_V = mixed_at(
            t, 2 * key_width + h * value_dim + at_V, v_column_V, is_in_V, *carried, *sizes, WIDTH, HAS_PENDING
        )
        ba_at = ba_ptr + (start + t) * ba_stride + 2 * j * repeats + r
        beta = tl.sigmoid(tl.load(ba_at).to(tl.float32))
        S = tl.exp(-A * softplus(tl.load(ba_at + repeats).to(tl.float32) + dt_bias)) * S
        u_V = beta * (v_V - tl.sum(S * k_K[:, None], axis=0))
        S += k_K[:, None] * u_V[None, :]
        o_V = tl.sum(S * q_K[:, None], axis=0) / tl.sqrt(key_dim * 1.0)
        if HAS_BF16_STATE:
            S = S.to(tl.bfloat16).to(tl.float32)
        if HAS_DRAFT:
            u_at = pending_u_ptr + ((slot * num_drafts + t) * num_heads + h) * value_dim + at_V
            tl.store(u_at, u_V, mask=is_in_V & is_draft & (t < num_drafts))
        o_V = tl.where(is_slot, o_V, float("nan"))
        tl.store(o_ptr + ((start + t) * num_heads + h) * value_dim + at_V, o_V, mask=is_in_V)
    tl.store(state_at, S.to(state_ptr.dtype.element_ty), mask=is_in_KV & (is_draft == 0) & is_slot)


@triton.jit
def delta_commit_kernel(
    qkvz_ptr,
    ba_ptr,
    conv_weight_ptr,
    A_log_ptr,
    dt_bias_ptr,
    norm_weight_ptr,
    starts_ptr,
    slots_ptr,
    is_fresh_ptr,
    is_draft_ptr,
    conv_ptr,
    pending_conv_ptr,
    pending_k_ptr,
    pending_decay_ptr,
    num_accepted_ptr,
    o_ptr,
    out_ptr,
    qkvz_stride,
    ba_stride,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    num_channels,
    num_drafts,
    num_slots,
    eps,
    WIDTH: tl.constexpr,
    HAS_FRESH: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One head of q, k or v of one sequence: its carried inputs, what drafts keep of it, and the output of values."""
    n, c = tl.program_id(0), tl.program_id(1)
    repeats = num_heads // num_key_heads
    is_key, is_value = (c >= num_key_heads) & (c < 2 * num_key_heads), c >= 2 * num_key_heads
    h = c - 2 * num_key_heads
    j = tl.where(is_value, h // repeats, c % num_key_heads)
    dim = tl.where(is_value, value_dim, key_dim)
    first_channel = tl.where(is_value, 2 * num_key_heads * key_dim + h * value_dim, c * key_dim)
    inner = tl.where(is_value, 2 * key_dim + (h % repeats) * value_dim, tl.where(is_key, key_dim, 0))
    group = j * (num_channels // num_key_heads + repeats * value_dim)
    at_C = tl.arange(0, BLOCK)
    is_in_C, channel_C, column_C = at_C < dim, first_channel + at_C, group + inner + at_C
    start = tl.load(starts_ptr + n)
    length = (tl.load(starts_ptr + n + 1) - start).to(tl.int32)
    slot, is_slot, is_fresh, is_draft = slot_of(
        n, slots_ptr, is_fresh_ptr, is_draft_ptr, num_slots, HAS_FRESH, HAS_DRAFT
    )
    count = 0
    if HAS_PENDING:
        count = tl.where(is_fresh, 0, tl.minimum(tl.load(num_accepted_ptr + slot), num_drafts)).to(tl.int32)
    carried = (slot, start, count, is_fresh, conv_ptr, pending_conv_ptr, qkvz_ptr)
    sizes = (qkvz_stride, num_channels, num_drafts)
    if HAS_DRAFT:
        for t in range(tl.where(is_key & is_draft, tl.minimum(length, num_drafts), 0)):
            k_K = l2_normed(
                mixed_at(t, channel_C, column_C, is_in_C, *carried, conv_weight_ptr, *sizes, WIDTH, HAS_PENDING)
            )
            at = pending_k_ptr + ((slot * num_drafts + t) * num_key_heads + j) * key_dim + at_C
            tl.store(at, k_K, mask=is_in_C)
    at_W, at_L = tl.arange(0, BLOCK_W)[:, None], tl.arange(0, BLOCK_L)[:, None]
    last = count + tl.where(is_draft, 0, length)  # the first place that is carried on
    is_in_WC = (at_W < WIDTH - 1) & is_in_C[None, :]
    kept_WC = input_at(
        last + at_W, channel_C[None, :], column_C[None, :], is_in_WC, *carried, *sizes, WIDTH, HAS_PENDING
    )
    tl.debug_barrier()  # every thread has read before the first one writes
    conv_at = conv_ptr + (slot * (WIDTH - 1) + at_W) * num_channels + channel_C[None, :]
    tl.store(conv_at, kept_WC, mask=is_in_WC & is_slot)
    if is_value:
        A, dt_bias = tl.exp(tl.load(A_log_ptr + h).to(tl.float32)), tl.load(dt_bias_ptr + h).to(tl.float32)
        norm_C = tl.load(norm_weight_ptr + at_C, mask=is_in_C, other=0.0).to(tl.float32)
        for t in range(length):
            if HAS_DRAFT:
                a = tl.load(ba_ptr + (start + t) * ba_stride + 2 * j * repeats + repeats + h % repeats).to(tl.float32)
                decay_at = pending_decay_ptr + (slot * num_drafts + t) * num_heads + h
                tl.store(decay_at, tl.exp(-A * softplus(a + dt_bias)), mask=is_draft & (t < num_drafts))
            row = ((start + t) * num_heads + h) * value_dim
            z_at = qkvz_ptr + (start + t) * qkvz_stride + column_C + repeats * value_dim
            z_C = tl.load(z_at, mask=is_in_C, other=0.0).to(tl.float32)
            o_C = tl.load(o_ptr + row + at_C, mask=is_in_C, other=0.0)
            y_C = o_C / tl.sqrt(tl.sum(o_C * o_C, axis=0) / value_dim + eps) * norm_C * (z_C * tl.sigmoid(z_C))
            tl.store(out_ptr + row + at_C, y_C.to(out_ptr.dtype.element_ty), mask=is_in_C)
    if HAS_DRAFT:
        is_in_LC = (at_L < tl.minimum(length, num_drafts)) & is_in_C[None, :] & is_draft
        x_LC = tl.load(qkvz_ptr + (start + at_L) * qkvz_stride + column_C[None, :], mask=is_in_LC, other=0.0)
        at = pending_conv_ptr + (slot * num_drafts + at_L) * num_channels + channel_C[None, :]
        tl.store(at, x_LC.to(tl.float32), mask=is_in_LC)
