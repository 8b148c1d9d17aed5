"""Gated attention: grouped-query attention with per-head norms and an elementwise output gate.

Legend: T tokens, D hidden, X = query heads * head dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import Batch
from qnext.model.layers import Linear, make_norm


class Attention(nn.Module):
    """Full attention of all three families; `attention_output_gate` adds Qwen3-Next's gate.

    With the gate, each head of q_proj holds its query dims first and then its gate dims.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.has_gate = config.attention_output_gate
        hidden, bias = config.hidden_size, config.attention_bias
        query_dim = config.num_attention_heads * config.head_dim
        key_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query_dim * (2 if self.has_gate else 1), bias=bias)
        self.k_proj = Linear(hidden, key_dim, bias=bias)
        self.v_proj = Linear(hidden, key_dim, bias=bias)
        self.o_proj = Linear(query_dim, hidden, bias=bias)
        self.q_norm = make_norm(config, config.head_dim)
        self.k_norm = make_norm(config, config.head_dim)

    def forward(self, x_TD: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rope
        mixed_TX = ops.attention_mixer(
            self.q_proj(x_TD),
            self.k_proj(x_TD),
            self.v_proj(x_TD),
            q_norm_weight_K=self.q_norm.weight,
            k_norm_weight_K=self.k_norm.weight,
            eps=self.q_norm.eps,
            zero_centered=self.q_norm.zero_centered,
            has_gate=self.has_gate,
            cos=cos,
            sin=sin,
            packing=batch.packing,
            scale=self.head_dim**-0.5,
            cache=None if batch.cache is None else batch.cache.attention_cache(self.layer_index),
        )
        return self.o_proj(mixed_TX)
