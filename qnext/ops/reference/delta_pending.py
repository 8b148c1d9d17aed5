"""Tokens that Gated DeltaNet has computed and whose sequence may still reject them.

A recurrent state cannot be cut back, so a draft leaves it as it is. What its tokens would do to it is kept beside it,
a few vectors per token, and the next call applies those that were accepted, in the pass over the state that it makes
anyway.

Legend: N sequences, L drafted tokens at most, J key heads, R value heads per key head, H = J * R value heads, K and V
key and value head dims, C conv channels, W conv width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.memory import empty_huge
from qnext.ops.packing import Packing


class PendingTokens(NamedTuple):
    """What the last draft of every slot computed, for one layer.

    The first `num_accepted` tokens come before anything else that the slot's sequence computes; the others are never
    read. A call on a slot sets its number to 0. Whoever knows what was accepted writes it, between calls.
    """

    conv: Tensor  # [num_slots, L, C] inputs of the convolution
    k: Tensor  # [num_slots, L, J, K] normalised keys
    u: Tensor  # [num_slots, L, H, V] with S <- decay S + k u^T
    decay: Tensor  # [num_slots, L, H]
    num_accepted: Tensor  # [num_slots] int64

    @property
    def num_drafts(self) -> int:
        """L: how many tokens a draft may have."""
        return self.conv.shape[1]

    @staticmethod
    def empty(
        num_slots: int,
        num_drafts: int,
        *,
        num_channels: int,
        num_key_heads: int,
        state_shape: tuple[int, int, int],
        device: torch.device | str,
    ) -> PendingTokens:
        """Room for drafts beside states of [H, K, V] in fp32; nothing is accepted."""
        num_heads, key_dim, value_dim = state_shape
        shapes = ((num_channels,), (num_key_heads, key_dim), (num_heads, value_dim), (num_heads,))
        conv, k, u, decay = (
            empty_huge((num_slots, num_drafts, *shape), dtype=torch.float32, device=device) for shape in shapes
        )
        return PendingTokens(conv, k, u, decay, torch.zeros(num_slots, dtype=torch.long, device=device))

    def check_sizes(self, conv: Tensor, state: Tensor) -> None:
        """Raises ValueError where these are not of the sizes of a layer's carried states."""
        num_slots, num_heads, key_dim, value_dim = state.shape
        num_channels = conv.shape[2]
        key_width = num_channels - num_heads * value_dim
        shapes = ((num_channels,), (key_width // (2 * key_dim), key_dim), (num_heads, value_dim), (num_heads,))
        if any(x.shape != (num_slots, self.num_drafts, *shape) for x, shape in zip(self, shapes, strict=False)):
            raise ValueError(
                f"pending tokens {[tuple(x.shape) for x in self]} do not fit states of {tuple(conv.shape)} and "
                f"{tuple(state.shape)}"
            )
        assert self.num_accepted.dtype == torch.int64 and self.num_accepted.shape == (num_slots,)


def apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """Makes the accepted tokens of these slots a part of their states, in place; none is pending then."""
    counts_N = pending.num_accepted.index_select(0, slots_N)
    rows = advance_history(conv.index_select(0, slots_N), pending, slots_N, counts_N)
    conv.index_copy_(0, slots_N, rows)
    states = advance_state(state.index_select(0, slots_N), pending, slots_N, counts_N)
    state.index_copy_(0, slots_N, states)
    pending.num_accepted.index_fill_(0, slots_N, 0)


def advance_history(conv_NWC: Tensor, pending: PendingTokens, slots_N: Tensor, counts_N: Tensor) -> Tensor:
    """The last W - 1 inputs of each sequence after `counts_N` of its pending tokens."""
    both = torch.cat([conv_NWC, pending.conv.index_select(0, slots_N)], dim=1)
    kept_NW = counts_N[:, None] + torch.arange(conv_NWC.shape[1], device=conv_NWC.device)
    return both.gather(1, kept_NW[..., None].expand(-1, -1, both.shape[2]))


def advance_state(state_NHKV: Tensor, pending: PendingTokens, slots_N: Tensor, counts_N: Tensor) -> Tensor:
    """The states after `counts_N` pending tokens: each update fades by the decays that follow it.

    States in bf16 take up one after the other, rounded after each as they are without drafts.
    """
    _, k_NLJK, u_NLHV, decay_NLH = (x.index_select(0, slots_N) for x in pending[:-1])
    if state_NHKV.dtype == torch.bfloat16:
        for t in range(pending.num_drafts):
            k_NHK = k_NLJK[:, t].repeat_interleave(u_NLHV.shape[2] // k_NLJK.shape[2], dim=1)
            update_NHKV = k_NHK[..., None] * u_NLHV[:, t, :, None]
            after_NHKV = (state_NHKV * decay_NLH[:, t, :, None, None] + update_NHKV).to(state_NHKV.dtype)
            state_NHKV = torch.where((t < counts_N)[:, None, None, None], after_NHKV, state_NHKV)
        return state_NHKV
    is_accepted_NL1 = (torch.arange(pending.num_drafts, device=counts_N.device) < counts_N[:, None])[..., None]
    decay_NLH = torch.where(is_accepted_NL1, decay_NLH, 1.0)
    k_NLJK = torch.where(is_accepted_NL1[..., None], k_NLJK, 0.0)
    u_NLHV = torch.where(is_accepted_NL1[..., None], u_NLHV, 0.0)
    remains_NLH = decay_NLH.flip(1).cumprod(1).flip(1)
    after_NLH = torch.cat([remains_NLH[:, 1:], torch.ones_like(remains_NLH[:, :1])], dim=1)
    k_NLHK = k_NLJK.repeat_interleave(u_NLHV.shape[2] // k_NLJK.shape[2], dim=2) * after_NLH[..., None]
    updates_NHKV = torch.einsum("nlhk,nlhv->nhkv", k_NLHK, u_NLHV)
    return (state_NHKV * remains_NLH[:, 0, :, None, None] + updates_NHKV).to(state_NHKV.dtype)


def keep_first_tokens(
    pending: PendingTokens, slots_N: Tensor, first: Packing, conv: Tensor, k: Tensor, u: Tensor, decay: Tensor
) -> None:
    """Makes the tokens of `first`, at most L of each sequence, pending in the sequences' slots."""
    places = first.sequence_ids_T * pending.num_drafts + first.offsets_T
    for stored, new in zip(pending, (conv, k, u, decay), strict=False):
        rows = stored.new_zeros(len(slots_N) * pending.num_drafts, *stored.shape[2:])
        rows = rows.index_copy(0, places, new.to(stored.dtype))
        stored.index_copy_(0, slots_N, rows.view(len(slots_N), *stored.shape[1:]))
