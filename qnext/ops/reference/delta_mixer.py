"""The token mixer of Gated DeltaNet between its projections.

Legend: T tokens, N sequences, J key heads, R value heads per key head, H = J * R value heads, K and V key and value
head dims, C = 2 J K + H V conv channels, W conv width, X = C + H V and Y = 2 H widths of the projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.reference.conv import causal_conv1d_silu
from qnext.ops.reference.delta import gated_delta_rule
from qnext.ops.reference.norm import gated_rms_norm, l2_norm


class DeltaCache(NamedTuple):
    """Carried states of one layer and the slots where the sequences of a call find theirs. Updated in place.

    What the slot of a fresh sequence held is never read. Slots of one call differ from each other.
    """

    conv: Tensor  # [num_slots, W - 1, C] last inputs of the convolution, oldest first
    state: Tensor  # [num_slots, H, K, V] fp32
    slots_N: Tensor  # int64
    is_fresh_N: Tensor  # bool: starts with this call, from zeros
    has_fresh: bool = True  # whether any of is_fresh_N may be true; false saves a pass over the states

    def read(self, stored: Tensor) -> Tensor:
        """Rows of `stored` for the sequences, zero for the fresh ones."""
        rows = stored.index_select(0, self.slots_N)
        if not self.has_fresh:
            return rows
        fresh = self.is_fresh_N.view(-1, *(1,) * (rows.dim() - 1))
        return torch.where(fresh, torch.zeros((), dtype=rows.dtype, device=rows.device), rows)

    def write(self, stored: Tensor, rows: Tensor) -> None:
        stored.index_copy_(0, self.slots_N, rows.to(stored.dtype))


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
    conv_state = delta_state = None
    if cache is not None:
        conv_state, delta_state = cache.read(cache.conv), cache.read(cache.state)
    mixed_TC, conv_state = causal_conv1d_silu(
        qkv_TC, conv_weight_C1W.squeeze(1), packing=packing, initial_state_NWC=conv_state
    )
    qk_TC, v_TC = mixed_TC.split([2 * num_key_heads * key_head_dim, num_heads * value_dim], dim=-1)
    q_TJK, k_TJK = l2_norm(qk_TC.reshape(num_tokens, 2 * num_key_heads, key_head_dim)).chunk(2, dim=1)
    v_THV = v_TC.reshape(num_tokens, num_heads, value_dim)
    o_THV, delta_state = gated_delta_rule(
        q_TJK, k_TJK, v_THV, g_TH, beta_TH, packing=packing, initial_state_NHKV=delta_state
    )
    if cache is not None:
        cache.write(cache.conv, conv_state)
        cache.write(cache.state, delta_state)
    return gated_rms_norm(o_THV, z_THV, norm_weight_V, eps=eps).flatten(1)


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
