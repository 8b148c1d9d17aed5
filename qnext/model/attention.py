"""Gated attention: grouped-query attention with per-head norms and an elementwise output gate.

Legend: T tokens, D hidden, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

import torch
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
        num_tokens = x_TD.shape[0]
        q_THK = self.q_proj(x_TD).view(num_tokens, -1, self.head_dim * (2 if self.has_gate else 1))
        gate_THK = None
        if self.has_gate:
            q_THK, gate_THK = q_THK.chunk(2, dim=-1)
        k_TGK = self.k_proj(x_TD).view(num_tokens, -1, self.head_dim)
        v_TGK = self.v_proj(x_TD).view(num_tokens, -1, self.head_dim)
        q_THK = ops.apply_rope(self.q_norm(q_THK), *rope)
        k_TGK = ops.apply_rope(self.k_norm(k_TGK), *rope)
        out_THK = self._attend(q_THK, k_TGK, v_TGK, batch)
        if gate_THK is not None:
            out_THK = out_THK * torch.sigmoid(gate_THK)
        return self.o_proj(out_THK.flatten(1))

    def _attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Batch) -> Tensor:
        scale = self.head_dim**-0.5
        cache = batch.cache
        if cache is None:
            return ops.attention(q_THK, k_TGK, v_TGK, packing=batch.packing, scale=scale)
        pages = cache.kv[self.layer_index]
        ops.write_kv(k_TGK, v_TGK, pages.k, pages.v, write_index_T=cache.write_index_T)
        return ops.paged_attention(
            q_THK,
            pages.k,
            pages.v,
            packing=batch.packing,
            block_tables_NM=cache.block_tables_NM,
            context_lengths=cache.context_lengths,
            scale=scale,
        )
