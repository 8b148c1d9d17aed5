"""Gated DeltaNet: linear attention with a gated delta rule (arXiv 2412.06464) as Qwen3-Next lays it out.

Legend: T tokens, D hidden, J key heads, R value heads per key head, H = J * R value heads, K and V head dims,
C conv channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import Batch
from qnext.model.layers import GatedRMSNorm, Linear


class GatedDeltaNet(nn.Module):
    """One linear-attention mixer.

    in_proj_qkvz is laid out by key head: each group holds q (K), k (K), v (R * V), z (R * V); in_proj_ba holds
    b (R), a (R) per group. The convolution runs over all q, then all k, then all v.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_key_heads = config.linear_num_key_heads
        self.num_value_heads = config.linear_num_value_heads
        self.repeats = self.num_value_heads // self.num_key_heads
        self.key_head_dim = config.linear_key_head_dim
        self.value_head_dim = config.linear_value_head_dim
        self.key_dim, self.value_dim = config.linear_key_dim, config.linear_value_dim
        hidden, conv_dim = config.hidden_size, config.linear_conv_dim
        self.in_proj_qkvz = Linear(hidden, 2 * self.key_dim + 2 * self.value_dim, bias=False)
        self.in_proj_ba = Linear(hidden, 2 * self.num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, config.linear_conv_kernel_dim, groups=conv_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.norm = GatedRMSNorm(self.value_head_dim, eps=config.rms_norm_eps)
        self.out_proj = Linear(self.value_dim, hidden, bias=False)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        num_tokens = x_TD.shape[0]
        qkv_TC, z_THV = self._project_qkvz(x_TD)
        beta_TH, g_TH = self._project_gates(x_TD)
        cache, conv_state, delta_state = batch.cache, None, None
        if cache is not None:
            slots = cache.delta[self.layer_index]
            conv_state, delta_state = cache.read_slots(slots.conv), cache.read_slots(slots.state)
        mixed_TC, conv_state = ops.causal_conv1d_silu(
            qkv_TC, self.conv1d.weight.squeeze(1), packing=batch.packing, initial_state_NWC=conv_state
        )
        qk_TC, v_TC = mixed_TC.split([2 * self.key_dim, self.value_dim], dim=-1)
        qk_TJK = ops.l2_norm(qk_TC.reshape(num_tokens, 2 * self.num_key_heads, self.key_head_dim))
        q_TJK, k_TJK = qk_TJK.chunk(2, dim=1)
        o_THV, delta_state = ops.gated_delta_rule(
            q_TJK,
            k_TJK,
            v_TC.reshape(num_tokens, self.num_value_heads, self.value_head_dim),
            g_TH,
            beta_TH,
            packing=batch.packing,
            initial_state_NHKV=delta_state,
        )
        if cache is not None:
            cache.write_slots(slots.conv, conv_state)
            cache.write_slots(slots.state, delta_state)
        return self.out_proj(self.norm(o_THV, z_THV).flatten(1))

    def _project_qkvz(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the input of the convolution [T, C] and z [T, H, V]."""
        groups = self.in_proj_qkvz(x_TD).view(x_TD.shape[0], self.num_key_heads, -1)
        value_width = self.repeats * self.value_head_dim
        q, k, v, z = groups.split([self.key_head_dim, self.key_head_dim, value_width, value_width], dim=-1)
        qkv_TC = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)
        return qkv_TC, z.reshape(x_TD.shape[0], self.num_value_heads, self.value_head_dim)

    def _project_gates(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """beta in (0, 1) and the log decay g <= 0, [T, H] each, in fp32 at least."""
        groups = self.in_proj_ba(x_TD).view(x_TD.shape[0], self.num_key_heads, 2 * self.repeats)
        b, a = (part.flatten(1) for part in groups.chunk(2, dim=-1))
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        g_TH = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        return torch.sigmoid(b.to(wide)), g_TH
