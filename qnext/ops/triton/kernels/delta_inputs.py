"""What a token of Gated DeltaNet reads: inputs of the convolution, carried, accepted or new, and its slot.

A sequence's inputs of the convolution are numbered through: the W - 1 carried ones, then the accepted pending tokens,
then the tokens of the call. Legend: N sequences, C the channels of the convolution, W its width.
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
