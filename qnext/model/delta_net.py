"""Gated DeltaNet: linear attention with a gated delta rule (arXiv 2412.06464) as Qwen3-Next lays it out.

Legend: T tokens, D hidden, J key heads, R value heads per key head, H = J * R value heads, K and V head dims,
C conv channels, W conv width, Z = H * V, R rows of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import Batch
from qnext.model.layers import Conv1d, GatedRMSNorm, Linear, See, added_product, fusable, normed_products, unseen


class GatedDeltaNet(nn.Module):
    """One linear-attention mixer.

    The order is: projections, convolution, norm of queries and keys, gated delta rule, gated norm, output projection.
    One fused op computes everything between the projections, unless the convolution or the norm has to be called: see
    fusable. in_proj_qkvz is laid out by key head: each group holds q (K), k (K), v (R * V), z (R * V). in_proj_ba holds
    b (R), a (R) per group. The convolution runs over all q, then all k, then all v.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_key_heads, self.key_head_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.num_value_heads, self.eps = config.linear_num_value_heads, config.rms_norm_eps
        hidden, conv_dim, value_dim = config.hidden_size, config.linear_conv_dim, config.linear_value_dim
        self.in_proj_qkvz = Linear(hidden, 2 * config.linear_key_dim + 2 * value_dim, bias=False)
        self.in_proj_ba = Linear(hidden, 2 * self.num_value_heads, bias=False)
        self.conv1d = Conv1d(conv_dim, conv_dim, config.linear_conv_kernel_dim, groups=conv_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, eps=config.rms_norm_eps)
        self.out_proj = Linear(value_dim, hidden, bias=False)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        return self.out_proj(self._mixed(self.in_proj_qkvz(x_TD), self.in_proj_ba(x_TD), batch))

    def add_to(self, hidden_TD: Tensor, norm: nn.Module, batch: Batch) -> Tensor:
        """hidden + self(norm(hidden))"""
        qkvz_TX, ba_TY = normed_products(norm, hidden_TD, (self.in_proj_qkvz, self.in_proj_ba))
        return added_product(hidden_TD, self._mixed(qkvz_TX, ba_TY, batch), self.out_proj)

    def _mixed(self, qkvz_TX: Tensor, ba_TY: Tensor, batch: Batch) -> Tensor:
        """[T, Z]: from the outputs of the projections to the input of out_proj."""
        cache = None if batch.cache is None else batch.cache.delta_cache(self.layer_index)
        weights = self._fusable_weights()
        if weights is None:
            return self.mix(qkvz_TX, ba_TY, batch.packing, cache)
        return ops.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=batch.packing, cache=cache)

    def mix(
        self,
        qkvz_TX: Tensor,
        ba_TY: Tensor,
        packing: ops.Packing,
        cache: ops.DeltaCache | None,
        see: See = unseen,
    ) -> Tensor:
        """[T, Z]: what ops.gated_delta_mixer fuses, step by step; `see` is shown what lies between the steps."""
        qkv_TC, z_THV = ops.split_qkvz(
            qkvz_TX, num_key_heads=self.num_key_heads, key_head_dim=self.key_head_dim, num_heads=self.num_value_heads
        )
        beta_TH, g_TH = ops.delta_gates(ba_TY, self.A_log, self.dt_bias, num_key_heads=self.num_key_heads)
        carried = None if cache is None else ops.read_carried(cache, packing)
        mixed_TC, conv_NWC = self.conv1d(qkv_TC, packing, None if carried is None else carried.conv_NWC)
        q_TJK, k_TJK, v_THV = self._heads(see("conv", mixed_TC))
        inputs = ops.DeltaInputs(
            see("query", ops.l2_norm(q_TJK)),
            see("key", ops.l2_norm(k_TJK)),
            see("value", v_THV),
            see("decay", g_TH),
            see("beta", beta_TH),
        )
        if cache is None or carried is None:
            o_THV, _ = ops.gated_delta_rule(inputs, packing=packing)
        else:
            o_THV = ops.cached_delta_rule(inputs, qkv_TC, cache, packing=packing, before=carried, conv_NWC=conv_NWC)
        return see("gated_out", self.norm(see("core_out", o_THV), see("gate", z_THV)).flatten(1))

    def core(self, qkvz_TX: Tensor, ba_TY: Tensor, packing: ops.Packing, cache: ops.DeltaCache | None) -> Tensor | None:
        """[T, H, V]: what the gated norm takes, as the fused op computes it; None where the op cannot be used.

        The op runs with a norm and a gate that change no bit. An eps of 2^80 is all that the norm's root sees, so rows
        are multiplied by 2^-40, by weights of 2^34, and by silu(64) = 64.
        """
        weights = self._fusable_weights()
        if weights is None or weights.norm_weight_V.dtype == torch.float16:  # which has no 2^34
            return None
        open_TX = qkvz_TX.clone()
        groups_TJX = open_TX.unflatten(1, (self.num_key_heads, -1))
        groups_TJX[..., self.key_head_dim + groups_TJX.shape[-1] // 2 :] = 64.0  # z is half of what follows q and k
        weights = weights._replace(norm_weight_V=torch.full_like(weights.norm_weight_V, 2.0**34), eps=2.0**80)
        out_TZ = ops.gated_delta_mixer(open_TX, ba_TY, weights, packing=packing, cache=cache)
        return out_TZ.unflatten(1, (self.num_value_heads, -1))

    def gates(self, qkvz_TX: Tensor, ba_TY: Tensor) -> tuple[Tensor, Tensor]:
        """The log decays [T, H] and the output gates z [T, H, V], before their silu, of what the projections gave."""
        sizes = {"key_head_dim": self.key_head_dim, "num_heads": self.num_value_heads}
        _, z_THV = ops.split_qkvz(qkvz_TX, num_key_heads=self.num_key_heads, **sizes)
        _, g_TH = ops.delta_gates(ba_TY, self.A_log, self.dt_bias, num_key_heads=self.num_key_heads)
        return g_TH, z_THV

    def _heads(self, mixed_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k [T, J, K], v [T, H, V]"""
        key_dim = self.num_key_heads * self.key_head_dim
        q_TC, k_TC, v_TC = mixed_TC.split([key_dim, key_dim, mixed_TC.shape[1] - 2 * key_dim], dim=-1)
        q_TJK, k_TJK = (x_TC.unflatten(1, (self.num_key_heads, -1)) for x_TC in (q_TC, k_TC))
        return q_TJK, k_TJK, v_TC.unflatten(1, (self.num_value_heads, -1))

    def follow(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of one sequence from its start -> log decays [R, H], and the state [H, K, V] after them."""
        packing = ops.Packing([len(x_RD)], device=x_RD.device)
        qkvz_RX, ba_RY = self.in_proj_qkvz(x_RD), self.in_proj_ba(x_RD)
        qkv_RC, _ = ops.split_qkvz(
            qkvz_RX, num_key_heads=self.num_key_heads, key_head_dim=self.key_head_dim, num_heads=self.num_value_heads
        )
        beta_RH, g_RH = ops.delta_gates(ba_RY, self.A_log, self.dt_bias, num_key_heads=self.num_key_heads)
        mixed_RC, _ = self.conv1d(qkv_RC, packing)
        q_RJK, k_RJK, v_RHV = self._heads(mixed_RC)
        inputs = ops.DeltaInputs(ops.l2_norm(q_RJK), ops.l2_norm(k_RJK), v_RHV, g_RH, beta_RH)
        _, state_1HKV = ops.gated_delta_rule(inputs, packing=packing)
        return g_RH, state_1HKV[0]

    def keeps_bits(self) -> bool:
        """See layers.keeps_bits."""
        weights = self._fusable_weights()
        return weights is not None and ops.delta_keeps_bits(weights)

    def _fusable_weights(self) -> ops.DeltaWeights | None:
        conv_C1W, norm_V = fusable(self.conv1d), fusable(self.norm)
        if not isinstance(conv_C1W, Tensor) or not isinstance(norm_V, Tensor):
            return None
        return ops.DeltaWeights(
            conv_C1W,
            self.A_log,
            self.dt_bias,
            norm_V,
            eps=self.eps,
            num_key_heads=self.num_key_heads,
            key_head_dim=self.key_head_dim,
        )
