"""Mixture of experts: routing and grouped SwiGLU.

Legend: T tokens, D hidden, E experts, F expert width, A = T * top_k assignments sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.checks import check_experts, check_route
from qnext.ops.records import ExpertsLora, Routing, SharedExpert
from qnext.ops.torch.groups import Groups, group, grouped_mm, grouped_outer, sum_per_token, swiglu_halves
from qnext.ops.torch.lora import lora_experts_swiglu
from qnext.ops.torch.matrices import has_native_bf16, is_bf16_inference, is_frozen, linear
from qnext.ops.weights import Weight, dequantize


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> Routing:
    """See ops.route."""
    check_route(logits_TE, top_k, load_E, chosen_TA)
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    probs_TE = logits_TE.to(wide).softmax(-1)
    weights, experts = probs_TE.topk(top_k, dim=-1) if chosen_TA is None else (probs_TE.gather(1, chosen_TA), chosen_TA)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    if load_E is not None:
        load_E.index_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
    return Routing(weights, experts)


def experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """See ops.experts_swiglu."""
    check_experts(x_TD, gate_up_E2FD, down_EDF)
    out_TD = _routed_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    if shared is None:
        return out_TD
    hidden_TF = F.silu(linear(x_TD, shared.gate_proj_FD)) * linear(x_TD, shared.up_proj_FD)
    shared_TD = linear(hidden_TF, shared.down_proj_DF)
    if shared.gate_1D is not None:
        shared_TD = torch.sigmoid(linear(x_TD, shared.gate_1D)) * shared_TD
    return out_TD + shared_TD


def _routed_experts(x_TD: Tensor, gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight, routing: Routing) -> Tensor:
    if torch.is_grad_enabled() and is_frozen(gate_up_E2FD) and is_frozen(down_EDF):
        return lora_experts_swiglu(x_TD, gate_up_E2FD, down_EDF, ExpertsLora(None, None), routing=routing)
    if not isinstance(gate_up_E2FD, Tensor) or not isinstance(down_EDF, Tensor):
        return _quantized_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    if is_bf16_inference(x_TD, gate_up_E2FD, down_EDF):
        if x_TD.shape[0] == 1:
            return _one_token(x_TD, gate_up_E2FD, down_EDF, routing)
        if not has_native_bf16():
            return _widened_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    return _ExpertsFunction.apply(x_TD, gate_up_E2FD, down_EDF, routing.weights_TA.to(x_TD.dtype), routing.experts_TA)


def _quantized_experts(
    x_TD: Tensor, gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight, routing: Routing
) -> Tensor:
    """Each used expert's matrices dequantised in turn, in fp32: in the order in which the tokens name them, so that the
    numbers of experts, which may be places of a table, change no bit."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
    for expert in dict.fromkeys(routing.experts_TA.flatten().tolist()):
        tokens_A, place_A = (routing.experts_TA == expert).nonzero(as_tuple=True)
        gate_up, down = (dequantize(weight[expert], out_TD.dtype) for weight in (gate_up_E2FD, down_EDF))
        hidden_AF = swiglu_halves(x_TD[tokens_A].to(out_TD.dtype) @ gate_up.t())
        weights_A1 = routing.weights_TA[tokens_A, place_A, None].to(out_TD.dtype)
        out_TD.index_add_(0, tokens_A, (hidden_AF @ down.t()) * weights_A1)
    return out_TD.to(x_TD.dtype)


def _one_token(x_1D: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: Routing) -> Tensor:
    """Matrix-vector products of the chosen experts only; see ops.linear for why not matrix products."""
    x_D = x_1D[0]
    out_D = torch.zeros(x_D.shape, dtype=routing.weights_TA.dtype)
    for weight, expert in zip(routing.weights_TA[0].tolist(), routing.experts_TA[0].tolist(), strict=True):
        hidden = swiglu_halves(torch.mv(gate_up_E2FD[expert], x_D))
        out_D.add_(torch.mv(down_EDF[expert], hidden), alpha=weight)
    return out_D.to(x_1D.dtype)[None]


def _widened_experts(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: Routing) -> Tensor:
    """In fp32, each used expert's matrices widened in turn; see ops.linear."""
    groups = group(routing.experts_TA, len(gate_up_E2FD))
    x_AD = x_TD.float().index_select(0, groups.tokens_A)
    weights_A = torch.empty_like(routing.weights_TA).view(-1)
    weights_A[groups.places_TA.flatten()] = routing.weights_TA.flatten()
    gate_up, down = torch.empty(gate_up_E2FD.shape[1:]), torch.empty(down_EDF.shape[1:])
    start = 0
    for expert, end in enumerate(groups.ends_E.tolist()):
        if end > start:
            rows = x_AD[start:end]
            hidden = swiglu_halves(rows @ gate_up.copy_(gate_up_E2FD[expert]).t()).mul_(weights_A[start:end, None])
            torch.mm(hidden, down.copy_(down_EDF[expert]).t(), out=rows)
        start = end
    return sum_per_token(x_AD, groups).to(x_TD.dtype)


class _ExpertsFunction(torch.autograd.Function):
    """Weights scale the activations, which are narrower than the output. Activations are recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        groups = group(experts, len(gate_up))
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        x_AD = x.index_select(0, groups.tokens_A)
        hidden = grouped_mm(x_AD, gate_up.transpose(1, 2), groups)
        weights_A1 = torch.empty_like(weights).view(-1, 1)
        weights_A1[groups.places_TA.flatten()] = weights.view(-1, 1)
        out_AD = grouped_mm(swiglu_halves(hidden).mul_(weights_A1), down.transpose(1, 2), groups)
        ctx.save_for_backward(x_AD, hidden, gate_up, down, weights_A1)
        ctx.groups = groups
        return sum_per_token(out_AD, groups)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, hidden, gate_up, down, weights_A1 = ctx.saved_tensors
        groups: Groups = ctx.groups
        grad_A = grad_out.index_select(0, groups.tokens_A)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        inner = activated * up
        grad_scaled = grouped_mm(grad_A, down, groups)
        grad_weights = torch.linalg.vecdot(grad_scaled, inner)[groups.places_TA]
        grad_down = grouped_outer(grad_A, inner.mul_(weights_A1), groups)
        grad_inner = grad_scaled.mul_(weights_A1)
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_inner * up, gate, grad_input=grad_gate)
        torch.mul(grad_inner, activated, out=grad_up)
        grad_gate_up = grouped_outer(grad_hidden, x_AD, groups)
        grad_x = sum_per_token(grouped_mm(grad_hidden, gate_up, groups), groups)
        return grad_x, grad_gate_up, grad_down, grad_weights, None
