"""Products with weights, routing and experts. Legend: T tokens, D inputs, F outputs or expert width, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from qnext.ops.records import (
    ExpertsLora,
    LowRank,
    MadeByShared,
    Norm,
    NormedLinears,
    NormedRoute,
    Routing,
    SharedExpert,
)
from qnext.ops.reference.norm import rms_norm
from qnext.ops.reference.width import wide
from qnext.ops.weights import Weight, dequantize


def linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b"""
    y_TF = x_TD @ dequantize(weight_FD, x_TD.dtype).t()
    return y_TF if bias_F is None else y_TF + bias_F


def add_linear(residual_TF: Tensor, x_TD: Tensor, weight_FD: Tensor | Weight) -> Tensor:
    """residual + x W^T"""
    return residual_TF + linear(x_TD, weight_FD)


def normed_linears(x_TD: Tensor, norm: Norm, weights: tuple[Tensor | Weight, ...]) -> NormedLinears:
    """norm(x), and norm(x) W^T of each matrix"""
    rows_TD = rms_norm(x_TD, norm.weight_D, eps=norm.eps, zero_centered=norm.zero_centered)
    return NormedLinears(rows_TD, tuple(linear(rows_TD, weight) for weight in weights))


def cross_entropy_sum(hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, *, chunk_rows: int = 0) -> Tensor:
    """The sum of -log softmax(x W^T)[label] over the rows whose label is not negative, wide."""
    log_probs_RY = wide(linear(hidden_RD, weight_YD)).log_softmax(-1)
    is_counted_R = labels_R >= 0
    return -log_probs_RY[is_counted_R, labels_R[is_counted_R]].sum()


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> Routing:
    """Softmax over all experts, wide, then the best `top_k` or those that were chosen, then their sum made one."""
    probs_TE = wide(logits_TE).softmax(-1)
    experts_TA = probs_TE.topk(top_k, dim=-1).indices if chosen_TA is None else chosen_TA
    weights_TA = probs_TE.gather(1, experts_TA)
    if norm_topk_prob:
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
    if load_E is not None:
        load_E += experts_TA.flatten().bincount(minlength=len(load_E))
    return Routing(weights_TA, experts_TA)


def normed_route(
    x_TD: Tensor,
    norm: Norm,
    weight_ED: Tensor | Weight,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> NormedRoute:
    """norm(x), its logits, and the experts that they choose"""
    rows_TD, (logits_TE,) = normed_linears(x_TD, norm, (weight_ED,))
    how: Any = {"top_k": top_k, "norm_topk_prob": norm_topk_prob, "load_E": load_E, "chosen_TA": chosen_TA}
    return NormedRoute(rows_TD, logits_TE, route(logits_TE, **how))


def experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """[T, D]: of each token the weighted sum of its experts; the shared expert's part is scaled by sigmoid(gate x)."""
    rows = []
    for x_1D, weights_A, experts_A in zip(x_TD.split(1), *routing, strict=True):
        parts = [_expert(x_1D, gate_up_E2FD[e], down_EDF[e]) for e in experts_A.tolist()]
        rows.append(sum(weight.to(x_TD.dtype) * part for weight, part in zip(weights_A, parts, strict=True)))
    out_TD = torch.cat(rows)
    if shared is not None:
        inner_TF = silu(linear(x_TD, shared.gate_proj_FD)) * linear(x_TD, shared.up_proj_FD)
        shared_TD = linear(inner_TF, shared.down_proj_DF)
        scale_T1 = 1.0 if shared.gate_1D is None else torch.sigmoid(linear(x_TD, shared.gate_1D))
        out_TD = out_TD + scale_T1 * shared_TD
    return out_TD


def add_experts(
    residual_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """residual + experts_swiglu(x)"""
    return residual_TD + experts_swiglu(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared)


def combine_experts(
    rows_PD: Tensor, weights_TA: Tensor, places_TA: Tensor, shared: MadeByShared | None = None
) -> Tensor:
    """[T, D]: what experts made of tokens, row by row, added up for each token, in fp32 at least."""
    wide = torch.promote_types(rows_PD.dtype, torch.float32)
    out_TD = torch.zeros(len(places_TA), rows_PD.shape[1], dtype=wide, device=rows_PD.device)
    for weights_T, places_T in zip(weights_TA.unbind(1), places_TA.unbind(1), strict=True):
        out_TD = out_TD + weights_T[:, None] * rows_PD[places_T]
    if shared is None:
        return out_TD.to(rows_PD.dtype)
    scale: float | Tensor = 1.0
    if shared.gate_1D is not None:
        scale = torch.sigmoid(linear(shared.x_TD, shared.gate_1D))
    return (out_TD + scale * shared.rows_TD).to(rows_PD.dtype)


def lora_experts_swiglu(
    x_TD: Tensor, gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight, lora: ExpertsLora, *, routing: Routing
) -> Tensor:
    """The experts whose matrices are W + scale B A."""
    gate_up, down = dequantize(gate_up_E2FD, x_TD.dtype), dequantize(down_EDF, x_TD.dtype)
    places = list(range(len(down))) if lora.places_E is None else lora.places_E.tolist()
    changed = (_changed(weight, part, places) for weight, part in zip((gate_up, down), lora.parts, strict=True))
    return experts_swiglu(x_TD, *changed, routing=routing)


def _changed(weight_EFD: Tensor, part: LowRank | None, places: list[int]) -> Tensor:
    if part is None:
        return weight_EFD
    delta = part.scale * (part.B @ part.A)
    return torch.stack([w if k < 0 else w + delta[k].to(w.dtype) for w, k in zip(weight_EFD, places, strict=True)])


def _expert(x_1D: Tensor, gate_up_2FD: Tensor | Weight, down_DF: Tensor | Weight) -> Tensor:
    gate_1F, up_1F = linear(x_1D, gate_up_2FD).chunk(2, dim=-1)
    return linear(silu(gate_1F) * up_1F, down_DF)
