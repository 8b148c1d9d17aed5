"""The sparse feed-forward: router, routed experts, one shared expert.

Legend: T tokens, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.layers import MLP, Linear


class RouterOutput(NamedTuple):
    """What a router decided; probes and auxiliary losses read it through a forward hook on the router."""

    logits_TE: Tensor
    routing: ops.Routing


class Router(nn.Module):
    """Scores experts: softmax over all of them, the best top-k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x_TD: Tensor, *, load_E: Tensor | None = None) -> RouterOutput:
        if self.weight.dtype.itemsize > x_TD.dtype.itemsize:
            x_TD = x_TD.to(self.weight.dtype)  # a router that is kept wider computes so: its last bits choose experts
        logits_TE = ops.linear(x_TD, self.weight)
        routing = ops.route(logits_TE, top_k=self.top_k, norm_topk_prob=self.norm_topk_prob, load_E=load_E)
        return RouterOutput(logits_TE, routing)


class Experts(nn.Module):
    """All routed experts of a layer, stacked. On disk they are one tensor per expert and projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, routing: ops.Routing, shared: ops.SharedExpert | None) -> Tensor:
        return ops.experts_swiglu(x_TD, self.gate_up_proj, self.down_proj, routing=routing, shared=shared)


class SparseMoE(nn.Module):
    """Routed experts, plus a shared expert scaled by sigmoid(shared_expert_gate(x)) where the config has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert: MLP | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, *, load_E: Tensor | None = None) -> Tensor:
        return self.experts(x_TD, self.gate(x_TD, load_E=load_E).routing, self._shared())

    def _shared(self) -> ops.SharedExpert | None:
        """The shared expert's weights: one op multiplies them beside the routed ones."""
        if self.shared_expert is None:
            return None
        mlp = self.shared_expert
        return ops.SharedExpert(
            mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, self.shared_expert_gate.weight
        )
