"""Experts whose weights are not trained, with low-rank changes (LoRA, arXiv 2106.09685) that are.

No weight is copied for the backward pass: what is packed or of another dtype is widened again there, one expert at a
time. No change of a weight is ever computed as a matrix: rows go through its two factors.

Legend: T tokens, D hidden or inputs, E experts, F expert width, A assignments sorted by expert, S those of them whose
expert has low-rank parts, K experts with parts, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.checks import check_experts, check_lora
from qnext.ops.records import ExpertsLora, Routing
from qnext.ops.torch.groups import Groups, group, grouped_mm, grouped_outer, sum_per_token, swiglu_halves
from qnext.ops.weights import Weight, dequantize


def lora_experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    lora: ExpertsLora,
    *,
    routing: Routing,
) -> Tensor:
    """See ops.lora_experts_swiglu."""
    check_experts(x_TD, gate_up_E2FD, down_EDF)
    check_lora(gate_up_E2FD, down_EDF, lora)
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    factors = [None if part is None else (part.A.to(x_TD.dtype), part.B.to(x_TD.dtype)) for part in lora.parts]
    flat = [each for pair in factors for each in (pair or (None, None))]
    with torch.autocast(device, enabled=False):
        call = _FrozenPart(gate_up_E2FD, down_EDF, lora.places_E, [0.0 if p is None else p.scale for p in lora.parts])
        weights_TA = routing.weights_TA.to(x_TD.dtype)
        return _FrozenExperts.apply(x_TD, weights_TA, *flat, routing.experts_TA, call)


class _FrozenPart(NamedTuple):
    """What has no gradient."""

    gate_up: Tensor | Weight
    down: Tensor | Weight
    places_E: Tensor | None
    scales: list[float]  # of gate_up and of down


class _ChangedRows(NamedTuple):
    """The assignments whose expert has low-rank parts."""

    index_S: Tensor | None  # among the sorted assignments; None: all of them
    groups: Groups
    num_tokens: int

    def take(self, rows_AX: Tensor) -> Tensor:
        return rows_AX if self.index_S is None else rows_AX.index_select(0, self.index_S)

    def add(self, to_AX: Tensor, rows_SX: Tensor, scale: float) -> None:
        if self.index_S is None:
            to_AX.add_(rows_SX, alpha=scale)
        else:
            to_AX.index_add_(0, self.index_S, rows_SX, alpha=scale)

    def of_tokens(self, rows_TX: Tensor) -> Tensor:
        """[S, X]"""
        return rows_TX.index_select(0, self.groups.tokens_A)

    def per_token(self, rows_SX: Tensor) -> Tensor:
        """[T, X]: each token's rows summed."""
        if self.index_S is None:
            return sum_per_token(rows_SX, self.groups)
        return rows_SX.new_zeros(self.num_tokens, rows_SX.shape[1]).index_add_(0, self.groups.tokens_A, rows_SX)


def _rows_with_parts(groups: Groups, places_E: Tensor | None, num_parts: int, num_tokens: int) -> _ChangedRows:
    if places_E is None:
        return _ChangedRows(None, groups, num_tokens)
    part_A = places_E.index_select(0, groups.experts_A)
    index_S = (part_A >= 0).nonzero().squeeze(1)
    part_S = part_A.index_select(0, index_S)
    ends_K = torch.bincount(part_S, minlength=num_parts).cumsum(0).to(torch.int32)
    return _ChangedRows(index_S, Groups(groups.tokens_A.index_select(0, index_S), part_S, index_S, ends_K), num_tokens)


def _product(rows_AX: Tensor, weight_EYX: Tensor | Weight, groups: Groups, *, transposed: bool) -> Tensor:
    """Rows times W^T of their expert, or times W where `transposed`; packed weights are widened one after another."""
    if isinstance(weight_EYX, Tensor) and weight_EYX.dtype == rows_AX.dtype:
        return grouped_mm(rows_AX, weight_EYX if transposed else weight_EYX.transpose(1, 2), groups)
    out = rows_AX.new_empty(len(rows_AX), weight_EYX.shape[2 if transposed else 1])
    start = 0
    for expert, end in enumerate(groups.ends_E.tolist()):
        if end > start:
            matrix = dequantize(weight_EYX[expert], rows_AX.dtype)
            torch.mm(rows_AX[start:end], matrix if transposed else matrix.t(), out=out[start:end])
        start = end
    return out


def _is_shared(factors_KXY: Tensor, rows: _ChangedRows) -> bool:
    return len(factors_KXY) == 1 and len(rows.groups.ends_E) > 1


class _FrozenExperts(torch.autograd.Function):
    """As the function of trained experts; what is linear in a shared factor is summed over tokens before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, *others: Any) -> Tensor:
        *factors, experts, call = others
        gate_up_A, gate_up_B, down_A, down_B = factors
        groups = group(experts, call.gate_up.shape[0])
        num_parts = next((len(each) for each in (gate_up_B, down_A) if each is not None), 0)
        rows = _rows_with_parts(groups, call.places_E, num_parts, len(x))
        hidden = _product(x.index_select(0, groups.tokens_A), call.gate_up, groups, transposed=False)
        narrow_in = narrow_out = None
        if gate_up_A is not None:
            narrow_in = _into_rank(x, gate_up_A, rows)
            rows.add(hidden, grouped_mm(narrow_in, gate_up_B.transpose(1, 2), rows.groups), call.scales[0])
        weights_A1 = torch.empty_like(weights).view(-1, 1)
        weights_A1[groups.places_TA.flatten()] = weights.reshape(-1, 1)
        inner = swiglu_halves(hidden).mul_(weights_A1)
        out = sum_per_token(_product(inner, call.down, groups, transposed=False), groups)
        if down_A is not None:
            narrow_out = grouped_mm(rows.take(inner), down_A.transpose(1, 2), rows.groups)
            if _is_shared(down_B, rows):
                out.addmm_(rows.per_token(narrow_out), down_B[0].t(), alpha=call.scales[1])
            else:
                widened = grouped_mm(narrow_out, down_B.transpose(1, 2), rows.groups)
                out.add_(rows.per_token(widened), alpha=call.scales[1])
        ctx.save_for_backward(x, hidden, weights_A1, narrow_in, narrow_out, *factors)
        ctx.groups, ctx.rows, ctx.call = groups, rows, call
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weights_A1, narrow_in, narrow_out, gate_up_A, gate_up_B, down_A, down_B = ctx.saved_tensors
        groups, rows, call = ctx.groups, ctx.rows, ctx.call
        grad_A = grad_out.index_select(0, groups.tokens_A)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        inner = activated * up
        grad_scaled = _product(grad_A, call.down, groups, transposed=True)
        of_factors: list[Tensor | None] = [None, None, None, None]
        if down_A is not None:
            scaled_S = rows.take(inner * weights_A1)
            if _is_shared(down_B, rows):
                grad_narrow = rows.of_tokens(grad_out @ down_B[0])
                of_factors[3] = (grad_out.t() @ rows.per_token(narrow_out))[None].mul_(call.scales[1])
            else:
                grad_S = rows.take(grad_A)
                grad_narrow = grouped_mm(grad_S, down_B, rows.groups)
                of_factors[3] = grouped_outer(grad_S, narrow_out, rows.groups).mul_(call.scales[1])
            of_factors[2] = grouped_outer(grad_narrow, scaled_S, rows.groups).mul_(call.scales[1])
            rows.add(grad_scaled, grouped_mm(grad_narrow, down_A, rows.groups), call.scales[1])
        grad_weights = torch.linalg.vecdot(grad_scaled, inner)[groups.places_TA] if ctx.needs_input_grad[1] else None
        grad_hidden = _swiglu_backward(grad_scaled.mul_(weights_A1), gate, up, activated)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = sum_per_token(_product(grad_hidden, call.gate_up, groups, transposed=True), groups)
        if gate_up_A is not None:
            grad_S = rows.take(grad_hidden)
            of_factors[1] = grouped_outer(grad_S, narrow_in, rows.groups).mul_(call.scales[0])
            grad_narrow = grouped_mm(grad_S, gate_up_B, rows.groups).mul_(call.scales[0])
            of_factors[0] = _from_rank(grad_narrow, x, gate_up_A, rows, grad_x)
        return grad_x, grad_weights, *of_factors, None, None


def _into_rank(x_TD: Tensor, factors_KRD: Tensor, rows: _ChangedRows) -> Tensor:
    """[S, R]: each assignment's token times A^T of its expert. A shared A multiplies each token once."""
    if _is_shared(factors_KRD, rows):
        return rows.of_tokens(x_TD @ factors_KRD[0].t())
    return grouped_mm(rows.of_tokens(x_TD), factors_KRD.transpose(1, 2), rows.groups)


def _from_rank(
    grad_SR: Tensor, x_TD: Tensor, factors_KRD: Tensor, rows: _ChangedRows, grad_x_TD: Tensor | None
) -> Tensor:
    """The gradient of the factors of _into_rank; that of its tokens is added to `grad_x_TD`."""
    if _is_shared(factors_KRD, rows):
        grad_TR = rows.per_token(grad_SR)
        if grad_x_TD is not None:
            grad_x_TD.addmm_(grad_TR, factors_KRD[0])
        return (grad_TR.t() @ x_TD)[None]
    if grad_x_TD is not None:
        grad_x_TD.add_(rows.per_token(grouped_mm(grad_SR, factors_KRD, rows.groups)))
    return grouped_outer(grad_SR, rows.of_tokens(x_TD), rows.groups)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activated: Tensor) -> Tensor:
    """The gradient of both halves, from that of silu(gate) * up."""
    grad_hidden = grad.new_empty(len(grad), 2 * grad.shape[1])
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    torch.mul(grad, activated, out=grad_up)
    return grad_hidden
