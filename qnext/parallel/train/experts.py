"""Routed experts that are dealt to ranks: tokens go where their experts are, and come back.

Legend: T tokens, D hidden, E experts, A experts per token, P pairs of a token and an expert of this rank's tokens,
Q pairs of all ranks whose experts are here, R ranks, M experts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.errors import UsageError
from qnext.model import CausalLM, Experts, SparseMoE


def check_experts(config: ModelConfig, num_parts: int, *, num_ranks: int) -> None:
    """Raises UsageError where experts cannot be dealt to so many ranks of all."""
    if num_parts < 1 or num_ranks % num_parts:
        raise UsageError(f"--expert-parallel {num_parts}: it must divide the {num_ranks} ranks of the run")
    if num_parts > 1 and not config.num_experts:
        raise UsageError(f"--expert-parallel {num_parts}: the model has no experts")
    if config.num_experts % num_parts:
        raise UsageError(f"--expert-parallel {num_parts}: it must divide the {config.num_experts} experts of a layer")


def deal_experts(model: CausalLM, group: dist.ProcessGroup) -> list[nn.Module]:
    """Keep an equal share of the routed experts of every layer, neighbours together, in place. Returns the modules that
    have them."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, SparseMoE):
            if type(module.experts) is not Experts or not all(p.requires_grad for p in module.experts.parameters()):
                raise UsageError("--expert-parallel: with an adapter every process has all experts; leave it out")
            module.experts = DealtExperts(module.experts, model.config, group)
            found.append(module.experts)
    return found


class DealtExperts(Experts):
    """Some of the experts of a layer. Rows of all ranks of `group` meet at those that they are routed to."""

    def __init__(self, whole: Experts, config: ModelConfig, group: dist.ProcessGroup) -> None:
        num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        num_here = config.num_experts // num_ranks
        super().__init__(config.with_(num_experts=num_here, num_experts_per_tok=1))
        for name, parameter in whole.named_parameters():
            here = parameter.detach()[rank * num_here : (rank + 1) * num_here].clone()
            setattr(self, name, nn.Parameter(here))
        self.num_experts, self.num_ranks, self.group = config.num_experts, num_ranks, group

    def forward(self, x_TD: Tensor, routing: ops.Routing, shared: ops.SharedExpert | None = None) -> Tensor:
        assert shared is None, "the shared expert is called: see SparseMoE"
        num_tokens, top_k = routing.experts_TA.shape
        experts_P = routing.experts_TA.flatten()
        order_P = experts_P.argsort(stable=True)
        sent_RM = experts_P.bincount(minlength=self.num_experts).view(self.num_ranks, -1)
        received_RM = torch.empty_like(sent_RM)
        dist.all_to_all_single(received_RM, sent_RM, group=self.group)
        sent, received = sent_RM.sum(1).tolist(), received_RM.sum(1).tolist()
        rows_QD = _ExchangeRows.apply(x_TD.index_select(0, order_P // top_k), sent, received, self.group)
        back_PD = _ExchangeRows.apply(self._made(rows_QD, received_RM), received, sent, self.group)
        made_TAD = back_PD.index_select(0, order_P.argsort()).view(num_tokens, top_k, -1)
        return (made_TAD * routing.weights_TA[..., None]).sum(1).to(x_TD.dtype)

    def _made(self, rows_QD: Tensor, received_RM: Tensor) -> Tensor:
        """[Q, D]: what the experts here make of rows, which lie by rank and then by expert."""
        num_rows, num_here = len(rows_QD), received_RM.shape[1]
        experts_Q = torch.arange(num_here, device=rows_QD.device).repeat(self.num_ranks)
        experts_Q = experts_Q.repeat_interleave(received_RM.flatten(), output_size=num_rows)
        if not num_rows:  # parameters have a gradient on every rank, else FSDP's sums would not meet
            rows_QD, experts_Q = torch.cat([rows_QD, rows_QD.new_zeros(1, rows_QD.shape[1])]), experts_Q.new_zeros(1)
        ones_Q1 = torch.ones(len(rows_QD), 1, dtype=torch.promote_types(rows_QD.dtype, torch.float32))
        routing = ops.Routing(ones_Q1.to(rows_QD.device), experts_Q[:, None])
        return super().forward(rows_QD, routing)[:num_rows]


class _ExchangeRows(torch.autograd.Function):
    """Rows to the ranks of a group: the first so many to the first, and so on. Gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows_PD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad_QD, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(rows_PD: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    found_QD = rows_PD.new_empty(sum(received), rows_PD.shape[1])
    dist.all_to_all_single(found_QD, rows_PD.contiguous(), list(received), list(sent), group=group)
    return found_QD
