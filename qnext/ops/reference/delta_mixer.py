"""The token mixer of Gated DeltaNet between its projections.

Legend: T tokens, N sequences, J key heads, R value heads per key head, H = J * R value heads, K and V key and value
head dims, C = 2 J K + H V conv channels, W conv width, X = C + H V and Y = 2 H widths of the projections.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.reference.conv import causal_conv1d_silu
from qnext.ops.reference.delta import DELTA_CHUNK_SIZE, delta_rule_updates, gated_delta_rule, rounded_delta_rule
from qnext.ops.reference.delta_pending import PendingTokens, advance_history, advance_state, keep_first_tokens
from qnext.ops.reference.norm import gated_rms_norm, l2_norm


class DeltaCache(NamedTuple):
    """Carried states of one layer and the slots where the sequences of a call find theirs. Updated in place.

    What the slot of a fresh sequence held is never read. Slots of one call differ from each other.

    Slots with `pending` tokens allow drafts: where `is_draft_N` is true, the tokens of the call, at most
    `pending.num_drafts`, do not reach the carried states but become pending. In every call those pending tokens of its
    sequences that were accepted come first.

    A state in bf16 is rounded, to nearest even, at the end of a call, and within one after every drafted or accepted
    token, at multiples of 64 tokens of a prompt, and after every token behind the prompt. So calls that end elsewhere
    in a prompt change later bits. Arithmetic stays fp32.
    """

    conv: Tensor  # [num_slots, W - 1, C] last inputs of the convolution, oldest first
    state: Tensor  # [num_slots, H, K, V] fp32, fp64 for fp64 inputs, or bf16
    slots_N: Tensor  # int64
    is_fresh_N: Tensor  # bool: starts with this call, from zeros
    has_fresh: bool = True  # whether any of is_fresh_N may be true; false saves a pass over the states
    pending: PendingTokens | None = None
    is_draft_N: Tensor | None = None  # bool; None where nothing is a draft
    # For states in bf16, int64 on the CPU: tokens of each sequence with those of the call, None where they begin at a
    # multiple of 64; tokens of its prompt, None where the call has no others.
    context_lengths_N: Tensor | None = None
    prompt_lengths_N: Tensor | None = None

    def check_pending(self) -> None:
        """Raises ValueError for pending tokens of other sizes, or where drafts have no place."""
        if self.pending is not None:
            self.pending.check_sizes(self.conv, self.state)
        elif self.is_draft_N is not None:
            raise ValueError("drafts need slots with pending tokens")

    def read(self, stored: Tensor) -> Tensor:
        """Rows of `stored` for the sequences, zero for the fresh ones."""
        rows = stored.index_select(0, self.slots_N)
        if not self.has_fresh:
            return rows
        fresh = self.is_fresh_N.view(-1, *(1,) * (rows.dim() - 1))
        return torch.where(fresh, torch.zeros((), dtype=rows.dtype, device=rows.device), rows)

    def read_carried(self) -> tuple[Tensor, Tensor]:
        """Rows of `conv` and `state` after the accepted pending tokens."""
        conv, state = self.read(self.conv), self.read(self.state)
        if self.pending is None:
            return conv, state
        counts_N = self.read(self.pending.num_accepted)
        return (
            advance_history(conv, self.pending, self.slots_N, counts_N),
            advance_state(state, self.pending, self.slots_N, counts_N),
        )

    def write_carried(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
        """What was carried `after` the tokens of the call, or `before` them where they are drafts."""
        for stored, old, new in zip((self.conv, self.state), before, after, strict=True):
            rows = new.to(stored.dtype)
            if self.is_draft_N is not None:
                rows = torch.where(self.is_draft_N.view(-1, *(1,) * (rows.dim() - 1)), old.to(stored.dtype), rows)
            stored.index_copy_(0, self.slots_N, rows)
        if self.pending is not None:
            self.pending.num_accepted.index_fill_(0, self.slots_N, 0)


def gated_delta_mixer(
    qkvz_TX: Tensor,
    ba_TY: Tensor,
    *,
    conv_weight_C1W: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    num_key_heads: int,
    key_head_dim: int,
    packing: Packing,
    cache: DeltaCache | None = None,
) -> Tensor:
    """Convolution, L2 norm of q and k, gates, delta rule and gated norm: [T, H * V] for the output projection.

    Both inputs are laid out by key head: each group of qkvz holds q (K), k (K), v (R * V), z (R * V), each group of
    ba holds b (R), a (R). The convolution runs over all q, then all k, then all v. Sequences start from zeros where
    there is no cache.
    """
    num_tokens, num_heads, value_dim = qkvz_TX.shape[0], A_log_H.shape[0], norm_weight_V.shape[0]
    qkv_TC, z_THV = _split_qkvz(qkvz_TX, num_key_heads, key_head_dim, num_heads, value_dim)
    beta_TH, g_TH = _gates(ba_TY, A_log_H, dt_bias_H, num_key_heads)
    carried = None
    if cache is not None:
        cache.check_pending()
        _check_drafts(cache, packing)
        carried = cache.read_carried()
    mixed_TC, conv_state = causal_conv1d_silu(
        qkv_TC, conv_weight_C1W.squeeze(1), packing=packing, initial_state_NWC=carried and carried[0]
    )
    qk_TC, v_TC = mixed_TC.split([2 * num_key_heads * key_head_dim, num_heads * value_dim], dim=-1)
    q_TJK, k_TJK = l2_norm(qk_TC.reshape(num_tokens, 2 * num_key_heads, key_head_dim)).chunk(2, dim=1)
    v_THV = v_TC.reshape(num_tokens, num_heads, value_dim)
    if cache is not None and carried is not None and cache.state.dtype == torch.bfloat16:
        pieces = _stored_pieces(cache, packing)
        o_THV, delta_state = rounded_delta_rule(
            q_TJK, k_TJK, v_THV, g_TH, beta_TH, packing=packing, pieces=pieces, state_NHKV=carried[1]
        )
    else:
        o_THV, delta_state = gated_delta_rule(
            q_TJK, k_TJK, v_THV, g_TH, beta_TH, packing=packing, initial_state_NHKV=carried and carried[1]
        )
    if cache is not None and carried is not None:
        if cache.is_draft_N is not None:
            _keep_drafts(cache, packing, carried[1], qkv_TC, k_TJK, v_THV, g_TH, beta_TH)
        cache.write_carried(carried, (conv_state, delta_state))
    return gated_rms_norm(o_THV, z_THV, norm_weight_V, eps=eps).flatten(1)


def _stored_pieces(cache: DeltaCache, packing: Packing) -> list[list[int]]:
    """Lengths of the pieces of every sequence after which a state in bf16 is rounded."""
    lengths = packing.lengths
    ends = lengths if cache.context_lengths_N is None else cache.context_lengths_N.tolist()
    prompts = ends if cache.prompt_lengths_N is None else cache.prompt_lengths_N.tolist()
    is_draft = [False] * len(lengths) if cache.is_draft_N is None else cache.is_draft_N.tolist()
    pieces: list[list[int]] = []
    for length, end, prompt, drafts in zip(lengths, ends, prompts, is_draft, strict=True):
        behind = length if drafts else min(length, max(0, end - prompt))
        grid = range(end - length, end - behind)
        stops = [position for position in grid if position % DELTA_CHUNK_SIZE == 0 or position == grid.start]
        pieces.append([b - a for a, b in pairwise([*stops, grid.stop])] + [1] * behind)
    return pieces


def _check_drafts(cache: DeltaCache, packing: Packing) -> None:
    if cache.is_draft_N is None or cache.pending is None or packing.max_length <= cache.pending.num_drafts:
        return  # which sequences draft need not be known, so a GPU is not waited for
    longest = int(torch.where(cache.is_draft_N, packing.lengths_N, 0).max())
    if longest > cache.pending.num_drafts:
        raise ValueError(f"a draft of {longest} tokens: slots hold at most {cache.pending.num_drafts}")


def _keep_drafts(
    cache: DeltaCache,
    packing: Packing,
    state_NHKV: Tensor,
    qkv_TC: Tensor,
    k_TJK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
) -> None:
    """Makes the first tokens of every sequence pending; of sequences that do not draft, none will be accepted."""
    assert cache.pending is not None
    num_drafts = cache.pending.num_drafts
    first = Packing([min(length, num_drafts) for length in packing.lengths], device=packing.device)
    rows = packing.cu_seqlens[:-1][first.sequence_ids_T] + first.offsets_T
    qkv_TC, k_TJK, v_THV, g_TH, beta_TH = (x.index_select(0, rows) for x in (qkv_TC, k_TJK, v_THV, g_TH, beta_TH))
    u_THV = delta_rule_updates(k_TJK, v_THV, g_TH, beta_TH, packing=first, initial_state_NHKV=state_NHKV)
    keep_first_tokens(cache.pending, cache.slots_N, first, qkv_TC, k_TJK, u_THV, g_TH.exp())


def _split_qkvz(
    qkvz_TX: Tensor, num_key_heads: int, key_dim: int, num_heads: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Returns the input of the convolution [T, C] and z [T, H, V]."""
    groups = qkvz_TX.view(qkvz_TX.shape[0], num_key_heads, -1)
    value_width = num_heads // num_key_heads * value_dim
    q, k, v, z = groups.split([key_dim, key_dim, value_width, value_width], dim=-1)
    qkv_TC = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)
    return qkv_TC, z.reshape(qkvz_TX.shape[0], num_heads, value_dim)


def _gates(ba_TY: Tensor, A_log_H: Tensor, dt_bias_H: Tensor, num_key_heads: int) -> tuple[Tensor, Tensor]:
    """beta in (0, 1) and the log decay g <= 0, [T, H] each, in fp32 at least."""
    groups = ba_TY.view(ba_TY.shape[0], num_key_heads, -1)
    b, a = (part.flatten(1) for part in groups.chunk(2, dim=-1))
    wide = torch.promote_types(ba_TY.dtype, torch.float32)
    g_TH = -A_log_H.to(wide).exp() * F.softplus(a.to(wide) + dt_bias_H.to(wide))
    return torch.sigmoid(b.to(wide)), g_TH
