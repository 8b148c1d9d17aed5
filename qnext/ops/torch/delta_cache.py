"""The carried states of Gated DeltaNet, and tokens that are computed but that the sequence may still reject.

A recurrent state cannot be cut back, so a draft does not change it. What its tokens would change is kept beside it, a
few vectors per token. The next call applies the accepted ones in its ordinary pass over the state. Legend: see
qnext.ops.caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.caches import DeltaCache, PendingTokens
from qnext.ops.packing import Packing


class Carried(NamedTuple):
    """What sequences carry between their tokens."""

    conv_NWC: Tensor  # last W - 1 inputs of the convolution, oldest first
    state_NHKV: Tensor


def read_carried(cache: DeltaCache, packing: Packing) -> Carried:
    """What the sequences of a call carry, with their accepted pending tokens.

    Raises ValueError for pending tokens of other sizes, and where there is no space for drafts.
    """
    cache.check_pending()
    cache.check_drafts(packing)
    conv, state = _read(cache, cache.conv), _read(cache, cache.state)
    if cache.pending is None:
        return Carried(conv, state)
    counts_N = _read(cache, cache.pending.num_accepted)
    return Carried(
        advance_history(conv, cache.pending, cache.slots_N, counts_N),
        advance_state(state, cache.pending, cache.slots_N, counts_N),
    )


def _read(cache: DeltaCache, stored: Tensor) -> Tensor:
    """Rows of `stored` for the sequences, zero for the fresh ones."""
    rows = stored.index_select(0, cache.slots_N)
    if not cache.has_fresh:
        return rows
    fresh = cache.is_fresh_N.view(-1, *(1,) * (rows.dim() - 1))
    return torch.where(fresh, torch.zeros((), dtype=rows.dtype, device=rows.device), rows)


def write_carried(cache: DeltaCache, before: Carried, after: Carried) -> None:
    """Store what was carried `after` the tokens of the call, or `before` them where they are drafts."""
    for stored, old, new in zip((cache.conv, cache.state), before, after, strict=True):
        rows = new.to(stored.dtype)
        if cache.is_draft_N is not None:
            rows = torch.where(cache.is_draft_N.view(-1, *(1,) * (rows.dim() - 1)), old.to(stored.dtype), rows)
        stored.index_copy_(0, cache.slots_N, rows)
    if cache.pending is not None:
        cache.pending.num_accepted.index_fill_(0, cache.slots_N, 0)


def apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """Makes the accepted tokens of these slots a part of their states, in place. No token is pending then."""
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
    """The states after `counts_N` pending tokens. Each update fades by the decays that follow it.

    bf16 states apply one token after the other and are rounded after each, as they are without drafts.
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
    pending: PendingTokens, slots_N: Tensor, first: Packing, drafted: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Makes the tokens of `first`, at most L of each sequence, pending in the sequences' slots.

    `drafted` has the fields of PendingTokens for each token: conv, k, u, decay.
    """
    places = first.sequence_ids_T * pending.num_drafts + first.offsets_T
    for stored, new in zip(pending, drafted, strict=False):
        rows = stored.new_zeros(len(slots_N) * pending.num_drafts, *stored.shape[2:])
        rows = rows.index_copy(0, places, new.to(stored.dtype))
        stored.index_copy_(0, slots_N, rows.view(len(slots_N), *stored.shape[1:]))
