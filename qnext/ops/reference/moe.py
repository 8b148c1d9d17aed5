"""Mixture of experts: routing and grouped SwiGLU.

Legend: T tokens, D hidden, E experts, F expert width, A = T * top_k assignments sorted by expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.reference.linear import has_native_bf16, is_bf16_inference, linear
from qnext.ops.weights import Weight, dequantize


class Routing(NamedTuple):
    weights_TA: Tensor  # [T, top_k] fp32
    experts_TA: Tensor  # [T, top_k] int64


class SharedExpert(NamedTuple):
    """An expert that every token passes through; each weight is a tensor or quantised."""

    gate_proj_FD: Weight
    up_proj_FD: Weight
    down_proj_DF: Weight
    gate_1D: Tensor | None  # its output is scaled by sigmoid(gate x), or by one

    @property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        return self.gate_proj_FD, self.up_proj_FD, self.down_proj_DF


def route(logits_TE: Tensor, *, top_k: int, norm_topk_prob: bool, load_E: Tensor | None = None) -> Routing:
    """See ops.route."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    weights, experts = logits_TE.to(wide).softmax(-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    if load_E is not None:
        load_E.index_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
    return Routing(weights, experts)


def swiglu_halves(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up for a last dim that holds gate, then up."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def experts_swiglu(
    x_TD: Tensor, gate_up_E2FD: Weight, down_EDF: Weight, *, routing: Routing, shared: SharedExpert | None = None
) -> Tensor:
    """See ops.experts_swiglu."""
    out_TD = _routed_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    if shared is None:
        return out_TD
    hidden_TF = F.silu(linear(x_TD, shared.gate_proj_FD)) * linear(x_TD, shared.up_proj_FD)
    shared_TD = linear(hidden_TF, shared.down_proj_DF)
    if shared.gate_1D is not None:
        shared_TD = torch.sigmoid(linear(x_TD, shared.gate_1D)) * shared_TD
    return out_TD + shared_TD


def _routed_experts(x_TD: Tensor, gate_up_E2FD: Weight, down_EDF: Weight, routing: Routing) -> Tensor:
    if not isinstance(gate_up_E2FD, Tensor) or not isinstance(down_EDF, Tensor):
        return _quantized_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    if is_bf16_inference(x_TD, gate_up_E2FD, down_EDF):
        if x_TD.shape[0] == 1:
            return _one_token(x_TD, gate_up_E2FD, down_EDF, routing)
        if not has_native_bf16():
            return _widened_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    return _Experts.apply(x_TD, gate_up_E2FD, down_EDF, routing.weights_TA.to(x_TD.dtype), routing.experts_TA)


def _quantized_experts(x_TD: Tensor, gate_up_E2FD: Weight, down_EDF: Weight, routing: Routing) -> Tensor:
    """Each used expert's matrices dequantised in turn, in fp32."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert in routing.experts_TA.unique().tolist():
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
    groups = _group(routing.experts_TA, len(gate_up_E2FD))
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
    return _sum_per_token(x_AD, groups).to(x_TD.dtype)


class _Groups(NamedTuple):
    """Assignments sorted by expert."""

    tokens_A: Tensor  # the token of each sorted row
    experts_A: Tensor  # the expert of each sorted row
    places_TA: Tensor  # [T, top_k] the sorted row of each assignment
    ends_E: Tensor  # int32, where each expert's rows end


def _group(experts_TA: Tensor, num_experts: int) -> _Groups:
    experts_A, order_A = experts_TA.flatten().sort(stable=True)
    tokens_A = torch.div(order_A, experts_TA.shape[1], rounding_mode="floor")
    places_A = torch.empty_like(order_A).index_copy_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    ends_E = torch.bincount(experts_A, minlength=num_experts).cumsum(0).to(torch.int32)
    return _Groups(tokens_A, experts_A, places_A.view_as(experts_TA), ends_E)


def _sum_per_token(rows_AD: Tensor, groups: _Groups) -> Tensor:
    """[A, D] sorted rows -> [T, D], each token's rows summed."""
    return F.embedding_bag(groups.places_TA, rows_AD, mode="sum")


def _fits_grouped_mm(*tensors: Tensor) -> bool:
    """torch's grouped product takes fp32 and bf16 whose rows are multiples of 16 bytes."""
    return all(
        t.dtype in (torch.float32, torch.bfloat16) and all(size * t.element_size() % 16 == 0 for size in t.shape[1:])
        for t in tensors
    )


def _grouped_mm(x_AD: Tensor, weight_EDF: Tensor, groups: _Groups) -> Tensor:
    """Rows of x, sorted by expert, times the matrix of their expert: [A, D] x [E, D, F] -> [A, F]."""
    if _fits_grouped_mm(x_AD, weight_EDF):
        return F.grouped_mm(x_AD, weight_EDF, offs=groups.ends_E)
    rows_A, capacity = _padded_rows(groups)
    padded = _pad_groups(x_AD, rows_A, len(weight_EDF), capacity) @ weight_EDF
    return padded.flatten(0, 1).index_select(0, rows_A)


def _grouped_outer(x_AD: Tensor, y_AF: Tensor, groups: _Groups) -> Tensor:
    """Per expert x^T y over its rows: [A, D], [A, F] -> [E, D, F]; zero for experts without rows."""
    if _fits_grouped_mm(x_AD, y_AF):
        return F.grouped_mm(x_AD.t(), y_AF, offs=groups.ends_E)
    rows_A, capacity = _padded_rows(groups)
    x, y = (_pad_groups(rows, rows_A, len(groups.ends_E), capacity) for rows in (x_AD, y_AF))
    return x.transpose(1, 2) @ y


def _padded_rows(groups: _Groups) -> tuple[Tensor, int]:
    counts_E = groups.ends_E.diff(prepend=groups.ends_E.new_zeros(1))
    capacity = int(counts_E.max())
    starts_A = (groups.ends_E - counts_E).index_select(0, groups.experts_A)
    places_A = torch.arange(len(groups.experts_A), device=starts_A.device) - starts_A
    return groups.experts_A * capacity + places_A, capacity


def _pad_groups(x_AD: Tensor, rows_A: Tensor, num_experts: int, capacity: int) -> Tensor:
    padded = x_AD.new_zeros(num_experts * capacity, x_AD.shape[1]).index_copy(0, rows_A, x_AD)
    return padded.view(num_experts, capacity, -1)


class _Experts(torch.autograd.Function):
    """Weights scale the activations, which are narrower than the output. Activations are recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        groups = _group(experts, len(gate_up))
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        x_AD = x.index_select(0, groups.tokens_A)
        hidden = _grouped_mm(x_AD, gate_up.transpose(1, 2), groups)
        weights_A1 = torch.empty_like(weights).view(-1, 1)
        weights_A1[groups.places_TA.flatten()] = weights.view(-1, 1)
        out_AD = _grouped_mm(swiglu_halves(hidden).mul_(weights_A1), down.transpose(1, 2), groups)
        ctx.save_for_backward(x_AD, hidden, gate_up, down, weights_A1)
        ctx.groups = groups
        return _sum_per_token(out_AD, groups)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, hidden, gate_up, down, weights_A1 = ctx.saved_tensors
        groups: _Groups = ctx.groups
        grad_A = grad_out.index_select(0, groups.tokens_A)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        inner = activated * up
        grad_scaled = _grouped_mm(grad_A, down, groups)
        grad_weights = torch.linalg.vecdot(grad_scaled, inner)[groups.places_TA]
        grad_down = _grouped_outer(grad_A, inner.mul_(weights_A1), groups)
        grad_inner = grad_scaled.mul_(weights_A1)
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_inner * up, gate, grad_input=grad_gate)
        torch.mul(grad_inner, activated, out=grad_up)
        grad_gate_up = _grouped_outer(grad_hidden, x_AD, groups)
        grad_x = _sum_per_token(_grouped_mm(grad_hidden, gate_up, groups), groups)
        return grad_x, grad_gate_up, grad_down, grad_weights, None
