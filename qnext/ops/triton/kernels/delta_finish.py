"""The end of a step of Gated DeltaNet, of the heads that share a key head: outputs, and what the sequence carries on.

Legend: J key heads, R value heads of a key head, K key head dim, H value head dim, Z = R * H, C the channels of the
convolution, W its width, L drafted tokens at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.delta_inputs import input_at, l2_normed, mixed_at, softplus


@triton.jit
def kept_inputs(
    first,
    channel_C,
    column_C,
    is_in_C,
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
    BLOCK_W: tl.constexpr,
):
    """The inputs of the convolution [W - 1, C] from a place on, which the next call goes on with."""
    at_W = tl.arange(0, BLOCK_W)[:, None]
    return input_at(
        first + at_W,
        channel_C[None, :],
        column_C[None, :],
        (at_W < WIDTH - 1) & is_in_C[None, :],
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


@triton.jit
def new_inputs(rows_ptr, channel_C, column_C, is_in_C, num_rows, row_stride, BLOCK_L: tl.constexpr):
    """Those of the first rows of a projection, in fp32."""
    at_L = tl.arange(0, BLOCK_L)[:, None]
    is_in_LC = (at_L < num_rows) & is_in_C[None, :]
    return tl.load(rows_ptr + at_L * row_stride + column_C[None, :], mask=is_in_LC, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x_RC, rows_ptr, channel_C, column_C, is_in_C, num_rows, row_stride, BLOCK_R: tl.constexpr):
    at_R = tl.arange(0, BLOCK_R)[:, None]
    tl.store(rows_ptr + at_R * row_stride + channel_C[None, :], x_RC, mask=(at_R < num_rows) & is_in_C[None, :])


@triton.jit
def carry_on(
    q_channel_K,
    q_column_K,
    is_q_K,
    k_channel_K,
    k_column_K,
    is_k_K,
    v_channel_Z,
    v_column_Z,
    is_v_Z,
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
    length,
    is_draft,
    is_slot,
    WIDTH: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Inputs of the convolution into the slot: those that the next call goes on with, and those of drafts."""
    q_at, k_at = (q_channel_K, q_column_K, is_q_K), (k_channel_K, k_column_K, is_k_K)
    v_at = (v_channel_Z, v_column_Z, is_v_Z)
    memory = (slot, start, count, is_fresh, conv_ptr, pending_ptr, qkvz_ptr, qkvz_stride, num_channels, num_drafts)
    last = count + tl.where(is_draft, 0, length)  # the first place that is carried on
    q_WK = kept_inputs(last, *q_at, *memory, WIDTH, HAS_PENDING, BLOCK_W)
    k_WK = kept_inputs(last, *k_at, *memory, WIDTH, HAS_PENDING, BLOCK_W)
    v_WZ = kept_inputs(last, *v_at, *memory, WIDTH, HAS_PENDING, BLOCK_W)
    tl.debug_barrier()  # every thread has read before the first one writes
    conv_ptr += slot * (WIDTH - 1) * num_channels
    num_rows = tl.where(is_slot, WIDTH - 1, 0)
    store_rows(q_WK, conv_ptr, *q_at, num_rows, num_channels, BLOCK_W)
    store_rows(k_WK, conv_ptr, *k_at, num_rows, num_channels, BLOCK_W)
    store_rows(v_WZ, conv_ptr, *v_at, num_rows, num_channels, BLOCK_W)
    if HAS_DRAFT:
        num_kept = tl.where(is_draft, tl.minimum(length, num_drafts), 0)
        pending_ptr += slot * num_drafts * num_channels
        new_ptr = qkvz_ptr + start * qkvz_stride
        q_LK = new_inputs(new_ptr, *q_at, num_kept, qkvz_stride, BLOCK_L)
        k_LK = new_inputs(new_ptr, *k_at, num_kept, qkvz_stride, BLOCK_L)
        v_LZ = new_inputs(new_ptr, *v_at, num_kept, qkvz_stride, BLOCK_L)
        store_rows(q_LK, pending_ptr, *q_at, num_kept, num_channels, BLOCK_L)
        store_rows(k_LK, pending_ptr, *k_at, num_kept, num_channels, BLOCK_L)
        store_rows(v_LZ, pending_ptr, *v_at, num_kept, num_channels, BLOCK_L)


@triton.jit
def gated_outputs(
    o_ptr, z_ptr, norm_weight_ptr, out_ptr, at_RH, is_in_RH, num_tokens, row_stride, z_stride, value_dim, eps
):
    """The norm of some heads of tokens, times silu of their gates."""
    at_H = tl.arange(0, at_RH.shape[1])
    norm_H = tl.load(norm_weight_ptr + at_H, mask=at_H < value_dim, other=0.0).to(tl.float32)
    for t in range(num_tokens):
        z_RH = tl.load(z_ptr + t * z_stride + at_RH, mask=is_in_RH, other=0.0).to(tl.float32)
        o_RH = tl.load(o_ptr + t * row_stride + at_RH, mask=is_in_RH, other=0.0, cache_modifier=".cg")
        root_R = tl.sqrt(tl.sum(o_RH * o_RH, axis=1) / value_dim + eps)
        y_RH = o_RH / root_R[:, None] * norm_H[None, :] * (z_RH * tl.sigmoid(z_RH))
        tl.store(out_ptr + t * row_stride + at_RH, y_RH.to(out_ptr.dtype.element_ty), mask=is_in_RH)


@triton.jit
def store_decays(a_ptr_R, decay_ptr_R, A_log_ptr_R, dt_bias_ptr_R, is_in_R, num_tokens, a_stride, decay_stride):
    """What the state of some heads is multiplied by, of drafts."""
    A_R = tl.exp(tl.load(A_log_ptr_R, mask=is_in_R, other=0.0).to(tl.float32))
    dt_bias_R = tl.load(dt_bias_ptr_R, mask=is_in_R, other=0.0).to(tl.float32)
    for t in range(num_tokens):
        a_R = tl.load(a_ptr_R + t * a_stride, mask=is_in_R, other=0.0).to(tl.float32)
        tl.store(decay_ptr_R + t * decay_stride, tl.exp(-A_R * softplus(a_R + dt_bias_R)), mask=is_in_R)


@triton.jit
def finish(
    j,
    slot,
    start,
    count,
    is_fresh,
    is_draft,
    is_slot,
    length,
    qkvz_ptr,
    ba_ptr,
    conv_weight_ptr,
    A_log_ptr,
    dt_bias_ptr,
    norm_weight_ptr,
    conv_ptr,
    pending_conv_ptr,
    pending_k_ptr,
    pending_decay_ptr,
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
    eps,
    WIDTH: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The outputs of the heads that share a key head, and what these carry on.

    BLOCKS are those of value heads, value dims, carried inputs and drafts.
    """
    BLOCK_R: tl.constexpr = BLOCKS[0]
    BLOCK_HEAD: tl.constexpr = BLOCKS[1]
    repeats, key_width = num_heads // num_key_heads, num_key_heads * key_dim
    group = j * (num_channels // num_key_heads + repeats * value_dim)
    at_K = tl.arange(0, BLOCK_K)
    is_in_K = at_K < key_dim
    carried = (slot, start, count, is_fresh, conv_ptr, pending_conv_ptr, qkvz_ptr, conv_weight_ptr)
    sizes = (qkvz_stride, num_channels, num_drafts)
    at_RH = tl.arange(0, BLOCK_R)[:, None] * value_dim + tl.arange(0, BLOCK_HEAD)[None, :]
    is_in_RH = (tl.arange(0, BLOCK_R) < repeats)[:, None] & (tl.arange(0, BLOCK_HEAD) < value_dim)[None, :]
    is_in_Z, at_Z = tl.reshape(is_in_RH, [BLOCK_R * BLOCK_HEAD]), tl.reshape(at_RH, [BLOCK_R * BLOCK_HEAD])
    q_at, k_channel_K = (j * key_dim + at_K, group + at_K, is_in_K), key_width + j * key_dim + at_K
    k_at = (k_channel_K, group + key_dim + at_K, is_in_K)
    v_at = (2 * key_width + j * repeats * value_dim + at_Z, group + 2 * key_dim + at_Z, is_in_Z)
    if HAS_DRAFT:
        for t in range(tl.where(is_draft, tl.minimum(length, num_drafts), 0)):
            k_K = l2_normed(mixed_at(t, *k_at, *carried, *sizes, WIDTH, HAS_PENDING))
            at = pending_k_ptr + ((slot * num_drafts + t) * num_key_heads + j) * key_dim + at_K
            tl.store(at, k_K, mask=is_in_K)
    kept = (slot, start, count, is_fresh, conv_ptr, pending_conv_ptr, qkvz_ptr)
    ends = (length, is_draft, is_slot)
    carry_on(*q_at, *k_at, *v_at, *kept, *sizes, *ends, WIDTH, HAS_PENDING, HAS_DRAFT, BLOCKS[2], BLOCKS[3])
    first_row = (start * num_heads + j * repeats) * value_dim
    z_ptr = qkvz_ptr + start * qkvz_stride + group + 2 * key_dim + repeats * value_dim
    memory = (o_ptr + first_row, z_ptr, norm_weight_ptr, out_ptr + first_row)
    gated_outputs(*memory, at_RH, is_in_RH, length, num_heads * value_dim, qkvz_stride, value_dim, eps)
    if HAS_DRAFT:
        at_R, num_kept = tl.arange(0, BLOCK_R), tl.where(is_draft, tl.minimum(length, num_drafts), 0)
        a_ptr = ba_ptr + start * ba_stride + 2 * j * repeats + repeats + at_R
        decay_ptr = pending_decay_ptr + slot * num_drafts * num_heads + j * repeats + at_R
        vectors = (A_log_ptr + j * repeats + at_R, dt_bias_ptr + j * repeats + at_R, at_R < repeats)
        store_decays(a_ptr, decay_ptr, *vectors, num_kept, ba_stride, num_heads)
