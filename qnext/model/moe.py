"""The sparse feed-forward: router, routed experts, one shared expert.

Legend: T tokens, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import KeepsRouting
from qnext.model.layers import MLP, Fusable, Linear, RMSNorm, fusable, is_plain
from qnext.model.weights import HoldsWeights


class RouterOutput(NamedTuple):
    """The decision of a router. Probes and auxiliary losses read it through a forward hook on the router."""

    logits_TE: Tensor
    routing: ops.Routing


class Router(Fusable, HoldsWeights):
    """Scores the experts: softmax over all of them, then the best top-k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x_TD: Tensor, *, load_E: Tensor | None = None, chosen_TA: Tensor | None = None) -> RouterOutput:
        return self.choose(self.scores(x_TD), load_E=load_E, chosen_TA=chosen_TA)

    def choose(
        self, logits_TE: Tensor, *, load_E: Tensor | None = None, chosen_TA: Tensor | None = None
    ) -> RouterOutput:
        """The experts of these logits; `load_E` and `chosen_TA` are those of ops.route."""
        routing = ops.route(
            logits_TE, top_k=self.top_k, norm_topk_prob=self.norm_topk_prob, load_E=load_E, chosen_TA=chosen_TA
        )
        return RouterOutput(logits_TE, routing)

    def choose_normed(
        self, hidden_TD: Tensor, norm: ops.Norm, *, load_E: Tensor | None, chosen_TA: Tensor | None
    ) -> ops.NormedRoute:
        """norm(hidden), and what a plain router as wide as these rows makes of it."""
        return ops.normed_route(
            hidden_TD,
            norm,
            self.weight,
            top_k=self.top_k,
            norm_topk_prob=self.norm_topk_prob,
            load_E=load_E,
            chosen_TA=chosen_TA,
        )

    def scores(self, x_TD: Tensor) -> Tensor:
        """[T, E] logits"""
        if self.weight.dtype.itemsize > x_TD.dtype.itemsize:
            x_TD = x_TD.to(self.weight.dtype)  # a router that is kept wider computes so: its last bits choose experts
        return ops.linear(x_TD, self.weight)

    def fusable_weight(self) -> Tensor | ops.Weight | None:
        return self.weight if is_plain(self, Router) else None

    def keeps_bits(self) -> bool:
        """See layers.keeps_bits."""
        return ops.linear_keeps_bits(self.weight)


class Experts(HoldsWeights):
    """All routed experts of a layer, stacked. On disk they are one tensor per expert and projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, routing: ops.Routing, shared: ops.SharedExpert | None = None) -> Tensor:
        """`shared` has the weights of the shared expert, which the same op multiplies beside the routed experts."""
        return ops.experts_swiglu(x_TD, self.gate_up_proj, self.down_proj, routing=routing, shared=shared)

    def add_to(self, hidden_TD: Tensor, x_TD: Tensor, routing: ops.Routing, shared: ops.SharedExpert | None) -> Tensor:
        """hidden + self(x, routing, shared)"""
        weights = self.gate_up_proj, self.down_proj
        return ops.add_experts(hidden_TD, x_TD, *weights, routing=routing, shared=shared)

    def inner(self, x_TD: Tensor, experts_TA: Tensor) -> Tensor:
        """[T, A, F]: silu(gate(x)) * up(x) of each chosen expert, for probes: one expert after another."""

        def activate(expert: int, x_RD: Tensor) -> Tensor:
            return ops.swiglu(*(x.contiguous() for x in ops.linear(x_RD, self.gate_up_proj[expert]).chunk(2, dim=-1)))

        return _by_expert(activate, x_TD[:, None].expand(-1, experts_TA.shape[1], -1), experts_TA)

    def outputs(self, inner_TAF: Tensor, experts_TA: Tensor) -> Tensor:
        """[T, A, D]: what each chosen expert makes of its inner activations."""
        return _by_expert(lambda expert, x_RF: ops.linear(x_RF, self.down_proj[expert]), inner_TAF, experts_TA)

    def keeps_bits(self) -> bool:
        """See layers.keeps_bits."""
        return ops.experts_keep_bits(self.gate_up_proj, self.down_proj)


def _write(routing: ops.Routing, pages: KeepsRouting | None) -> None:
    if pages is not None:
        pages.write(routing.experts_TA)


def _by_expert(compute: Callable[[int, Tensor], Tensor], x_TAX: Tensor, experts_TA: Tensor) -> Tensor:
    """[T, A, ...]: of each row what the expert at its place computes."""
    rows_RX, experts_R = x_TAX.flatten(0, 1), experts_TA.flatten()
    order_R = experts_R.argsort(stable=True)
    counts = experts_R.bincount().tolist()
    parts = rows_RX.index_select(0, order_R).split(counts)
    computed = [compute(expert, part) for expert, part in enumerate(parts) if len(part)]
    return torch.cat(computed).index_select(0, order_R.argsort()).unflatten(0, experts_TA.shape)


class SparseMoE(nn.Module):
    """Routed experts, and where the config has one, a shared expert scaled by sigmoid(shared_expert_gate(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert: MLP | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def forward(
        self,
        x_TD: Tensor,
        *,
        load_E: Tensor | None = None,
        chosen_TA: Tensor | None = None,
        pages: KeepsRouting | None = None,
    ) -> Tensor:
        """See `route` for the arguments."""
        return self._made(x_TD, self.route(x_TD, load_E=load_E, chosen_TA=chosen_TA, pages=pages))

    def add_to(
        self,
        hidden_TD: Tensor,
        norm: nn.Module,
        *,
        load_E: Tensor | None = None,
        chosen_TA: Tensor | None = None,
        pages: KeepsRouting | None = None,
    ) -> Tensor:
        """hidden + self(norm(hidden))"""
        weight_ED, form = fusable(self.gate), norm.fusable_norm() if isinstance(norm, RMSNorm) else None
        if form is None or weight_ED is None or weight_ED.dtype.itemsize > hidden_TD.dtype.itemsize:
            x_TD = norm(hidden_TD)
            routing = self.route(x_TD, load_E=load_E, chosen_TA=chosen_TA, pages=pages)
        else:
            x_TD, _, routing = self.gate.choose_normed(hidden_TD, form, load_E=load_E, chosen_TA=chosen_TA)
            _write(routing, pages)
        return self._made(x_TD, routing, hidden_TD)

    def route(
        self, x_TD: Tensor, *, load_E: Tensor | None, chosen_TA: Tensor | None, pages: KeepsRouting | None
    ) -> ops.Routing:
        """`load_E` and `chosen_TA` are those of ops.route; the choice is written to `pages`."""
        routing: ops.Routing = self.gate(x_TD, load_E=load_E, chosen_TA=chosen_TA).routing
        _write(routing, pages)
        return routing

    def _made(self, x_TD: Tensor, routing: ops.Routing, hidden_TD: Tensor | None = None) -> Tensor:
        """[T, D]: what all experts make of the rows, added to `hidden_TD` where it is given."""
        mlp = self.shared_expert
        shared = None if mlp is None else self._fusable_shared(mlp)
        is_one_call = mlp is None or shared is not None
        if is_one_call and hidden_TD is not None and is_plain(self.experts, Experts):
            return self.experts.add_to(hidden_TD, x_TD, routing, shared)
        made_TD: Tensor = self.experts(x_TD, routing) if shared is None else self.experts(x_TD, routing, shared)
        if mlp is not None and shared is None:
            made_TD = ops.add(made_TD, torch.sigmoid(self.shared_expert_gate(x_TD)) * mlp(x_TD))
        return made_TD if hidden_TD is None else ops.add(hidden_TD, made_TD)

    def _fusable_shared(self, mlp: MLP) -> ops.SharedExpert | None:
        """None where the experts or a part of the shared one have to be called: see fusable."""
        if not is_plain(mlp, MLP) or not is_plain(self.experts, Experts):
            return None
        gate_FD, up_FD, down_DF = fusable(mlp.gate_proj), fusable(mlp.up_proj), fusable(mlp.down_proj)
        gate_1D = fusable(self.shared_expert_gate)
        if gate_FD is None or up_FD is None or down_DF is None or not isinstance(gate_1D, Tensor):
            return None
        return ops.SharedExpert(gate_FD, up_FD, down_DF, gate_1D)
