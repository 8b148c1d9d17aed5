"""Gated attention: grouped-query attention with per-head norms and an elementwise output gate.

Legend: T tokens, D hidden, H query heads, G KV heads, K head dim, X = H * K (2 * H * K with gates), Y = G * K,
Z = H * K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import Batch
from qnext.model.layers import Linear, See, added_product, fusable, make_norm, normed_products, unseen


class Attention(nn.Module):
    """Full attention of all three families. `attention_output_gate` adds Qwen3-Next's gate.

    The order is: projections, norms of queries and keys, rotation, attention, gate, output projection. One fused op
    computes everything between the projections, unless a norm has to be called: see fusable.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.has_gate = config.attention_output_gate
        self.eps, self.zero_centered = config.rms_norm_eps, config.zero_centered_norm
        hidden, bias = config.hidden_size, config.attention_bias
        query_dim = config.num_attention_heads * config.head_dim
        key_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query_dim * (2 if self.has_gate else 1), bias=bias)
        self.k_proj = Linear(hidden, key_dim, bias=bias)
        self.v_proj = Linear(hidden, key_dim, bias=bias)
        self.o_proj = Linear(query_dim, hidden, bias=bias)
        self.q_norm = make_norm(config, config.head_dim)
        self.k_norm = make_norm(config, config.head_dim)

    def forward(self, x_TD: Tensor, batch: Batch, rope: ops.Rope) -> Tensor:
        projected = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        return self.o_proj(self._mixed(projected, batch, rope))

    def add_to(self, hidden_TD: Tensor, norm: nn.Module, batch: Batch, rope: ops.Rope) -> Tensor:
        """hidden + self(norm(hidden))"""
        q_TX, k_TY, v_TY = normed_products(norm, hidden_TD, (self.q_proj, self.k_proj, self.v_proj))
        return added_product(hidden_TD, self._mixed((q_TX, k_TY, v_TY), batch, rope), self.o_proj)

    def _mixed(self, projected: tuple[Tensor, Tensor, Tensor], batch: Batch, rope: ops.Rope) -> Tensor:
        """[T, Z]: from the outputs of the projections to the input of o_proj."""
        cache = None if batch.cache is None else batch.cache.attention_cache(self.layer_index)
        weights = self._fusable_weights()
        if weights is None:
            return self.mix(*projected, rope, batch.packing, cache)
        return ops.attention_mixer(*projected, weights, rope=rope, packing=batch.packing, cache=cache)

    def mix(
        self,
        q_TX: Tensor,
        k_TY: Tensor,
        v_TY: Tensor,
        rope: ops.Rope,
        packing: ops.Packing,
        cache: ops.AttentionCache | None,
        see: See = unseen,
    ) -> Tensor:
        """[T, Z]: what ops.attention_mixer fuses, step by step; `see` is shown what lies between the steps."""
        q_THK, gate_THK = self._queries_and_gates(q_TX)
        k_TGK, v_TGK = (x_TY.unflatten(1, (-1, self.head_dim)) for x_TY in (k_TY, v_TY))
        q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        q_THK, k_TGK = see("query", ops.apply_rope(q_THK, rope)), see("key", ops.apply_rope(k_TGK, rope))
        v_TGK = see("value", v_TGK)
        if cache is None:
            out_THK = ops.attention(q_THK, k_TGK, v_TGK, packing=packing, scale=self.scale)
        else:
            out_THK = ops.cached_attention(q_THK, k_TGK, v_TGK, cache, packing=packing, scale=self.scale)
        out_THK = see("core_out", out_THK)
        if gate_THK is not None:
            out_THK = out_THK * torch.sigmoid(see("gate", gate_THK))
        return see("gated_out", out_THK.flatten(1))

    def core(
        self,
        q_TX: Tensor,
        k_TY: Tensor,
        v_TY: Tensor,
        rope: ops.Rope,
        packing: ops.Packing,
        cache: ops.AttentionCache | None,
    ) -> Tensor | None:
        """[T, H, K]: what the gates are multiplied with, by the fused op without gates; None where the op cannot be
        used. Keys and values are written once more, with the same bits."""
        weights = self._fusable_weights()
        if weights is None:
            return None
        q_TZ = self._queries_and_gates(q_TX)[0].flatten(1)
        weights = weights._replace(has_gate=False)
        out_TZ = ops.attention_mixer(q_TZ, k_TY, v_TY, weights, rope=rope, packing=packing, cache=cache)
        return out_TZ.unflatten(1, (-1, self.head_dim))

    def gates(self, q_TX: Tensor) -> Tensor | None:
        """[T, H, K]: the output gates, before their sigmoid, of what q_proj gave; None without gates."""
        return self._queries_and_gates(q_TX)[1]

    def _queries_and_gates(self, q_TX: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, H, K] each: with gates, each head of q_proj holds its query dims first and then its gate dims."""
        if not self.has_gate:
            return q_TX.unflatten(1, (-1, self.head_dim)), None
        q_THK, gate_THK = q_TX.unflatten(1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        return q_THK, gate_THK

    def keeps_bits(self) -> bool:
        """See layers.keeps_bits."""
        weights = self._fusable_weights()
        return weights is not None and ops.attention_keeps_bits(weights)

    def _fusable_weights(self) -> ops.AttentionWeights | None:
        q_K, k_K = fusable(self.q_norm), fusable(self.k_norm)
        if not isinstance(q_K, Tensor) or not isinstance(k_K, Tensor):
            return None
        return ops.AttentionWeights(
            q_K, k_K, eps=self.eps, zero_centered=self.zero_centered, has_gate=self.has_gate, scale=self.scale
        )
