"""The token mixer of Gated DeltaNet between its projections.

Legend: T tokens, N sequences, J key heads, R value heads per key head, H = J * R value heads, K and V key and value
head dims, C = 2 J K + H V conv channels, W conv width, X = C + H V and Y = 2 H widths of the projections.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.caches import DELTA_CHUNK_SIZE, DeltaCache
from qnext.ops.checks import check_delta
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaWeights
from qnext.ops.torch.conv import causal_conv1d_silu
from qnext.ops.torch.delta import delta_rule_updates, gated_delta_rule, rounded_delta_rule
from qnext.ops.torch.delta_cache import Carried, keep_first_tokens, read_carried, write_carried
from qnext.ops.torch.norm import gated_rms_norm, l2_norm


def gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> Tensor:
    """See ops.gated_delta_mixer."""
    check_delta(qkvz_TX, ba_TY, weights, packing)
    num_tokens, num_heads, value_dim = qkvz_TX.shape[0], weights.num_heads, weights.value_head_dim
    num_key_heads, key_head_dim = weights.num_key_heads, weights.key_head_dim
    qkv_TC, z_THV = split_qkvz(qkvz_TX, num_key_heads=num_key_heads, key_head_dim=key_head_dim, num_heads=num_heads)
    beta_TH, g_TH = delta_gates(ba_TY, weights.A_log_H, weights.dt_bias_H, num_key_heads=num_key_heads)
    carried = None if cache is None else read_carried(cache, packing)
    mixed_TC, conv_NWC = causal_conv1d_silu(
        qkv_TC, weights.conv_weight_C1W.squeeze(1), packing=packing, initial_state_NWC=carried and carried.conv_NWC
    )
    qk_TC, v_TC = mixed_TC.split([2 * num_key_heads * key_head_dim, num_heads * value_dim], dim=-1)
    q_TJK, k_TJK = l2_norm(qk_TC.reshape(num_tokens, 2 * num_key_heads, key_head_dim)).chunk(2, dim=1)
    inputs = DeltaInputs(q_TJK, k_TJK, v_TC.reshape(num_tokens, num_heads, value_dim), g_TH, beta_TH)
    if cache is None or carried is None:
        o_THV, _ = gated_delta_rule(inputs, packing=packing)
    else:
        o_THV = cached_delta_rule(inputs, qkv_TC, cache, packing=packing, before=carried, conv_NWC=conv_NWC)
    return gated_rms_norm(o_THV, z_THV, weights.norm_weight_V, eps=weights.eps).flatten(1)


def split_qkvz(qkvz_TX: Tensor, *, num_key_heads: int, key_head_dim: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """The input of the convolution [T, C], all q, then all k, then all v; and z [T, H, V].

    Per key head `qkvz_TX` holds q (K), k (K), v (R * V), z (R * V).
    """
    groups = qkvz_TX.view(qkvz_TX.shape[0], num_key_heads, -1)
    value_width = groups.shape[-1] // 2 - key_head_dim
    q, k, v, z = groups.split([key_head_dim, key_head_dim, value_width, value_width], dim=-1)
    qkv_TC = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)
    return qkv_TC, z.reshape(qkvz_TX.shape[0], num_heads, -1)


def delta_gates(ba_TY: Tensor, A_log_H: Tensor, dt_bias_H: Tensor, *, num_key_heads: int) -> tuple[Tensor, Tensor]:
    """beta = sigmoid(b) in (0, 1) and the log decay g = -exp(A_log) softplus(a + dt_bias) <= 0, [T, H] each, in fp32 at
    least. Per key head `ba_TY` holds b (R), a (R)."""
    groups = ba_TY.view(ba_TY.shape[0], num_key_heads, -1)
    b, a = (part.flatten(1) for part in groups.chunk(2, dim=-1))
    wide = torch.promote_types(ba_TY.dtype, torch.float32)
    g_TH = -A_log_H.to(wide).exp() * F.softplus(a.to(wide) + dt_bias_H.to(wide))
    return torch.sigmoid(b.to(wide)), g_TH


def cached_delta_rule(
    inputs: DeltaInputs, qkv_TC: Tensor, cache: DeltaCache, *, packing: Packing, before: Carried, conv_NWC: Tensor
) -> Tensor:
    """[T, H, V]: the gated delta rule from the states `before` the tokens. The cache then holds the states after them.

    `qkv_TC` is the input of the convolution. `conv_NWC` is the end of it, which the cache carries beside the states.
    """
    if cache.state.dtype == torch.bfloat16:
        pieces = _stored_pieces(cache, packing)
        o_THV, state = rounded_delta_rule(inputs, packing=packing, pieces=pieces, state_NHKV=before.state_NHKV)
    else:
        o_THV, state = gated_delta_rule(inputs, packing=packing, initial_state_NHKV=before.state_NHKV)
    if cache.is_draft_N is not None:
        _keep_drafts(cache, packing, before.state_NHKV, qkv_TC, inputs)
    write_carried(cache, before, Carried(conv_NWC, state))
    return o_THV


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


def _keep_drafts(cache: DeltaCache, packing: Packing, state_NHKV: Tensor, qkv_TC: Tensor, inputs: DeltaInputs) -> None:
    """Makes the first tokens of every sequence pending; of sequences that do not draft, none will be accepted."""
    assert cache.pending is not None
    num_drafts = cache.pending.num_drafts
    first = Packing([min(length, num_drafts) for length in packing.lengths], device=packing.device)
    rows = packing.cu_seqlens[:-1][first.sequence_ids_T] + first.offsets_T
    inputs = DeltaInputs(*(x.index_select(0, rows) for x in inputs))
    u_THV = delta_rule_updates(inputs, packing=first, initial_state_NHKV=state_NHKV)
    drafted = (qkv_TC.index_select(0, rows), inputs.k_TJK, u_THV, inputs.g_TH.exp())
    keep_first_tokens(cache.pending, cache.slots_N, first, drafted)
