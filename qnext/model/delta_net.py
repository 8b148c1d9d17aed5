"""Gated DeltaNet: linear attention with a gated delta rule (arXiv 2412.06464) as Qwen3-Next lays it out.

Legend: T tokens, D hidden, J key heads, R value heads per key head, H = J * R value heads, K and V head dims,
C conv channels, W conv width, Z = H * V.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import Batch
from qnext.model.layers import Conv1d, GatedRMSNorm, Linear


class GatedDeltaNet(nn.Module):
    """One linear-attention mixer.

    in_proj_qkvz is laid out by key head: each group holds q (K), k (K), v (R * V), z (R * V); in_proj_ba holds
    b (R), a (R) per group. The convolution runs over all q, then all k, then all v.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_key_heads, self.key_head_dim = config.linear_num_key_heads, config.linear_key_head_dim
        num_value_heads, value_dim = config.linear_num_value_heads, config.linear_value_dim
        hidden, conv_dim = config.hidden_size, config.linear_conv_dim
        self.in_proj_qkvz = Linear(hidden, 2 * config.linear_key_dim + 2 * value_dim, bias=False)
        self.in_proj_ba = Linear(hidden, 2 * num_value_heads, bias=False)
        self.conv1d = Conv1d(conv_dim, conv_dim, config.linear_conv_kernel_dim, groups=conv_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(num_value_heads))
        self.A_log = nn.Parameter(torch.empty(num_value_heads))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, eps=config.rms_norm_eps)
        self.out_proj = Linear(value_dim, hidden, bias=False)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        mixed_TZ = ops.gated_delta_mixer(
            self.in_proj_qkvz(x_TD),
            self.in_proj_ba(x_TD),
            conv_weight_C1W=self.conv1d.weight,
            A_log_H=self.A_log,
            dt_bias_H=self.dt_bias,
            norm_weight_V=self.norm.weight,
            eps=self.norm.eps,
            num_key_heads=self.num_key_heads,
            key_head_dim=self.key_head_dim,
            packing=batch.packing,
            cache=batch.cache.delta_cache(self.layer_index) if batch.cache is not None else None,
        )
        return self.out_proj(mixed_TZ)
