"""The token mixer of Gated DeltaNet, and the states that it carries.

Legend: T tokens, J key heads, R value heads per key head, H value heads, K and V key and value head dims, C channels,
W width of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from qnext.ops.caches import DELTA_CHUNK_SIZE, DeltaCache, PendingTokens
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaWeights
from qnext.ops.reference.conv import convolve
from qnext.ops.reference.delta import delta_step, per_value_head
from qnext.ops.reference.norm import gated_rms_norm, l2_norm
from qnext.ops.reference.width import wide


class CarriedByOne(NamedTuple):
    """What one sequence carries from token to token."""

    left_WC: Tensor  # last inputs of the convolution
    state_HKV: Tensor


def gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> Tensor:
    """Convolution, L2 norm of q and k, gates, delta rule, gated norm. See ops.gated_delta_mixer."""
    if cache is not None:
        cache.check_pending()
        cache.check_drafts(packing)
    qkv_TC, z_THV = _split(qkvz_TX, weights)
    parts, start = [], 0
    for n, length in enumerate(packing.lengths):
        rows = slice(start, start + length)
        parts.append(_mix(qkv_TC[rows], ba_TY[rows], weights, cache, n))
        start += length
    return gated_rms_norm(torch.cat(parts), z_THV, weights.norm_weight_V, eps=weights.eps).flatten(1)


def _mix(qkv_TC: Tensor, ba_TY: Tensor, weights: DeltaWeights, cache: DeltaCache | None, n: int) -> Tensor:
    """[T, H, V] of sequence n, whose slot is brought up to date."""
    before = _begin(qkv_TC, weights) if cache is None else _from_slot(cache, n)
    mixed_TC, left_WC = convolve(qkv_TC, weights.conv_weight_C1W.squeeze(1), before.left_WC)
    inputs = _heads(mixed_TC, ba_TY, weights)
    tokens = list(zip(*per_value_head(inputs), strict=True))
    stored = set() if cache is None else _stored_after(cache, n, len(tokens))
    state_HKV, outputs, updates = wide(before.state_HKV), [], []
    for t, token in enumerate(tokens):
        o_HV, u_HV, state_HKV = delta_step(state_HKV, *token)
        outputs.append(o_HV)
        updates.append(u_HV)
        if cache is not None and t in stored:
            state_HKV = state_HKV.to(cache.state.dtype).to(state_HKV.dtype)
    if cache is not None and _is_draft(cache, n):
        _keep(cache, n, qkv_TC, inputs, torch.stack(updates))
        _to_slot(cache, n, before)
    elif cache is not None:
        _to_slot(cache, n, CarriedByOne(left_WC, state_HKV))
    return torch.stack(outputs).to(mixed_TC.dtype)


def _split(qkvz_TX: Tensor, weights: DeltaWeights) -> tuple[Tensor, Tensor]:
    """Inputs of the convolution [T, C]: all q, then all k, then all v; and z [T, H, V]."""
    values = weights.num_heads // weights.num_key_heads * weights.value_head_dim
    groups_TJX = qkvz_TX.unflatten(1, (weights.num_key_heads, -1))
    q, k, v, z = groups_TJX.split([weights.key_head_dim, weights.key_head_dim, values, values], dim=-1)
    return torch.cat([x.flatten(1) for x in (q, k, v)], dim=1), z.reshape(len(z), -1, weights.value_head_dim)


def _heads(mixed_TC: Tensor, ba_TY: Tensor, weights: DeltaWeights) -> DeltaInputs:
    """beta = sigmoid(b), g = -exp(A) softplus(a + dt), wide; b and a lie side by side for every key head."""
    key_width = weights.num_key_heads * weights.key_head_dim
    q_TX, k_TX, v_TX = mixed_TC.split([key_width, key_width, mixed_TC.shape[1] - 2 * key_width], dim=1)
    b_TJR, a_TJR = ba_TY.unflatten(1, (weights.num_key_heads, -1)).chunk(2, dim=-1)
    g_TH = -wide(weights.A_log_H).exp() * softplus(wide(a_TJR).flatten(1) + wide(weights.dt_bias_H))
    return DeltaInputs(
        l2_norm(q_TX.unflatten(1, (-1, weights.key_head_dim))),
        l2_norm(k_TX.unflatten(1, (-1, weights.key_head_dim))),
        v_TX.unflatten(1, (-1, weights.value_head_dim)),
        g_TH,
        torch.sigmoid(wide(b_TJR)).flatten(1),
    )


def _begin(qkv_TC: Tensor, weights: DeltaWeights) -> CarriedByOne:
    """Zeros."""
    channels, _, width = weights.conv_weight_C1W.shape
    sizes = (weights.num_heads, weights.key_head_dim, weights.value_head_dim)
    return CarriedByOne(qkv_TC.new_zeros(width - 1, channels), wide(qkv_TC).new_zeros(sizes))


def _from_slot(cache: DeltaCache, n: int) -> CarriedByOne:
    """Zeros for a fresh sequence, else what its slot holds after the accepted tokens of its last draft."""
    slot = int(cache.slots_N[n])
    if cache.has_fresh and cache.is_fresh_N[n]:
        return CarriedByOne(torch.zeros_like(cache.conv[slot]), torch.zeros_like(cache.state[slot]))
    return _accepted(cache.conv, cache.state, cache.pending, slot)


def _accepted(conv: Tensor, state: Tensor, pending: PendingTokens | None, slot: int) -> CarriedByOne:
    left_WC, state_HKV = conv[slot].clone(), state[slot].clone()
    count = 0 if pending is None else int(pending.num_accepted[slot])
    for t in range(count):
        assert pending is not None
        left_WC = torch.cat([left_WC, pending.conv[slot, t : t + 1].to(conv.dtype)])[1:]
        k_JK, u_HV, decay_H = pending.k[slot, t], pending.u[slot, t], pending.decay[slot, t]
        k_HK = k_JK.repeat_interleave(len(u_HV) // len(k_JK), dim=0)
        after_HKV = decay_H[:, None, None] * wide(state_HKV) + k_HK[:, :, None] * u_HV[:, None, :]
        state_HKV = after_HKV.to(state.dtype)
    return CarriedByOne(left_WC, state_HKV)


def _stored_after(cache: DeltaCache, n: int, num_tokens: int) -> set[int]:
    """After which tokens of the call the state has the dtype of the slots: see DeltaCache. All, if that is wide."""
    if cache.state.dtype != torch.bfloat16:
        return set()
    end = num_tokens if cache.context_lengths_N is None else int(cache.context_lengths_N[n])
    prompt = end if cache.prompt_lengths_N is None else int(cache.prompt_lengths_N[n])
    position_of = [end - num_tokens + t + 1 for t in range(num_tokens)]
    return {t for t, p in enumerate(position_of) if _is_draft(cache, n) or p >= prompt or p % DELTA_CHUNK_SIZE == 0}


def _is_draft(cache: DeltaCache, n: int) -> bool:
    return cache.is_draft_N is not None and bool(cache.is_draft_N[n])


def _to_slot(cache: DeltaCache, n: int, carried: CarriedByOne) -> None:
    slot = int(cache.slots_N[n])
    cache.conv[slot], cache.state[slot] = carried.left_WC.to(cache.conv.dtype), carried.state_HKV.to(cache.state.dtype)
    if cache.pending is not None:
        cache.pending.num_accepted[slot] = 0


def _keep(cache: DeltaCache, n: int, qkv_TC: Tensor, inputs: DeltaInputs, u_THV: Tensor) -> None:
    """Makes a draft pending: what its tokens would do, if they were accepted."""
    assert cache.pending is not None
    slot, num_tokens = int(cache.slots_N[n]), len(qkv_TC)
    for stored, new in zip(cache.pending, (qkv_TC, inputs.k_TJK, u_THV, inputs.g_TH.exp()), strict=False):
        stored[slot, :num_tokens] = new.to(stored.dtype)


def apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """The accepted tokens of these slots become part of their states; none is pending then."""
    for slot in slots_N.tolist():
        conv[slot], state[slot] = _accepted(conv, state, pending, slot)
        pending.num_accepted[slot] = 0
