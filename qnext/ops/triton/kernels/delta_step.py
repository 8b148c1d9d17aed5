"""A few tokens of Gated DeltaNet: each program has a block of a head's values. The last one of the heads that share a
key head norms their outputs, and writes what all of them have read.

Legend: N sequences, J key heads, H value heads, K and V key and value head dims, L drafted tokens at most, S the state
of a head [K, V].
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.delta_finish import finish
from qnext.ops.triton.kernels.delta_inputs import l2_normed, mixed_at, slot_of, softplus
from qnext.ops.triton.kernels.last import is_last


@triton.jit
def with_accepted(
    S,
    decay_ptr,
    k_ptr_K,
    u_ptr_V,
    is_in_K,
    is_in_V,
    count,
    decay_stride,
    k_stride,
    u_stride,
    HAS_BF16_STATE: tl.constexpr,
):
    """The state after the accepted pending tokens."""
    for t in range(count):
        k_K = tl.load(k_ptr_K + t * k_stride, mask=is_in_K, other=0.0)
        u_V = tl.load(u_ptr_V + t * u_stride, mask=is_in_V, other=0.0)
        S = tl.load(decay_ptr + t * decay_stride) * S + k_K[:, None] * u_V[None, :]
        if HAS_BF16_STATE:
            S = S.to(tl.bfloat16).to(tl.float32)
    return S


@triton.jit
def delta_step_kernel(
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
    state_ptr,
    pending_conv_ptr,
    pending_k_ptr,
    pending_u_ptr,
    pending_decay_ptr,
    num_accepted_ptr,
    o_ptr,
    out_ptr,
    counters_ptr,
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
    HAS_BF16_STATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Some values of one head of one sequence. A slot that does not exist is neither read nor written, and the outputs
    are NaN. Counters are those of the key heads of each sequence, and then those of the sequences."""
    n, h = tl.program_id(0), tl.program_id(1)
    repeats = num_heads // num_key_heads
    j, r = h // repeats, h % repeats
    start = tl.load(starts_ptr + n)
    length = (tl.load(starts_ptr + n + 1) - start).to(tl.int32)
    tables = (slots_ptr, is_fresh_ptr, is_draft_ptr)
    slot, is_slot, is_fresh, is_draft = slot_of(n, *tables, num_slots, HAS_FRESH, HAS_DRAFT)
    at_K, at_V = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_in_K, is_in_V = at_K < key_dim, at_V < value_dim
    state_at = state_ptr + (slot * num_heads + h) * key_dim * value_dim + at_K[:, None] * value_dim + at_V[None, :]
    is_in_KV = is_in_K[:, None] & is_in_V[None, :]
    S = tl.load(state_at, mask=is_in_KV & (is_fresh == 0), other=0.0).to(tl.float32)
    count = 0
    if HAS_PENDING:
        count = tl.where(is_fresh, 0, tl.minimum(tl.load(num_accepted_ptr + slot), num_drafts)).to(tl.int32)
        k_ptr_K = pending_k_ptr + (slot * num_drafts * num_key_heads + j) * key_dim + at_K
        u_ptr_V = pending_u_ptr + (slot * num_drafts * num_heads + h) * value_dim + at_V
        decay_ptr = pending_decay_ptr + slot * num_drafts * num_heads + h
        accepted = (decay_ptr, k_ptr_K, u_ptr_V, is_in_K, is_in_V, count)
        S = with_accepted(S, *accepted, num_heads, num_key_heads * key_dim, num_heads * value_dim, HAS_BF16_STATE)
        tl.debug_barrier()  # a thread may not write a draft where another still reads an accepted one
    if HAS_DRAFT:
        tl.store(state_at, S.to(state_ptr.dtype.element_ty), mask=is_in_KV & is_draft)
    group, key_width = j * (num_channels // num_key_heads + repeats * value_dim), num_key_heads * key_dim
    q_at, k_channel_K = (j * key_dim + at_K, group + at_K, is_in_K), key_width + j * key_dim + at_K
    k_at = (k_channel_K, group + key_dim + at_K, is_in_K)
    v_at = (2 * key_width + h * value_dim + at_V, group + 2 * key_dim + r * value_dim + at_V, is_in_V)
    carried = (slot, start, count, is_fresh, conv_ptr, pending_conv_ptr, qkvz_ptr, conv_weight_ptr)
    rows_and_drafts = (qkvz_stride, num_channels, num_drafts)
    A = tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
    dt_bias = tl.load(dt_bias_ptr + h).to(tl.float32)
    for t in range(length):
        q_K = l2_normed(mixed_at(t, *q_at, *carried, *rows_and_drafts, WIDTH, HAS_PENDING))
        k_K = l2_normed(mixed_at(t, *k_at, *carried, *rows_and_drafts, WIDTH, HAS_PENDING))
        v_V = mixed_at(t, *v_at, *carried, *rows_and_drafts, WIDTH, HAS_PENDING)
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
        o_at = o_ptr + ((start + t) * num_heads + h) * value_dim + at_V
        tl.store(o_at, tl.where(is_slot, o_V, float("nan")), mask=is_in_V)
    tl.store(state_at, S.to(state_ptr.dtype.element_ty), mask=is_in_KV & (is_draft == 0) & is_slot)
    if is_last(counters_ptr + n * num_key_heads + j, repeats * tl.num_programs(2)):
        sequence = (j, slot, start, count, is_fresh, is_draft, is_slot, length)
        rows = (qkvz_ptr, ba_ptr, conv_weight_ptr, A_log_ptr, dt_bias_ptr, norm_weight_ptr)
        memory = (conv_ptr, pending_conv_ptr, pending_k_ptr, pending_decay_ptr, o_ptr, out_ptr)
        sizes = (qkvz_stride, ba_stride, num_key_heads, num_heads, key_dim, value_dim, num_channels, num_drafts)
        finish(*sequence, *rows, *memory, *sizes, eps, WIDTH, HAS_PENDING, HAS_DRAFT, BLOCK_K, BLOCKS)
        if HAS_PENDING:
            of_sequence = counters_ptr + tl.num_programs(0) * num_key_heads + n
            tl.store(num_accepted_ptr + slot, 0, mask=is_slot & is_last(of_sequence, num_key_heads))
