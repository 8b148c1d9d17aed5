"""Dense layers and experts by native kernels.

Legend: T tokens, D hidden or inputs, F outputs or expert width, E experts, A experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.checks import check_experts, check_linear
from qnext.ops.cpu.kernels import check_memory, kernels, take, widened
from qnext.ops.cpu.panels import KIND_OF_FLOAT, PanelWeight
from qnext.ops.cpu.record_weights import RecordWeight
from qnext.ops.cpu.train_weights import train_experts, train_linear, trains_experts, trains_linear
from qnext.ops.records import MadeByShared, Routing, SharedExpert
from qnext.ops.weights import Weight

_STEP = 32  # inputs that the kernels for floats take at a time
_LANES = 16


def serves_linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> bool:
    if trains_linear(x_TD, weight_FD, bias_F):
        return True
    return take(x_TD, _grad_source(weight_FD), bias_F) and x_TD.dim() == 2 and fits_linear(weight_FD)


def linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> Tensor:
    """[T, F] fp32. See ops.linear."""
    if isinstance(weight_FD, Tensor) and trains_linear(x_TD, weight_FD, bias_F):
        return train_linear(x_TD, weight_FD, bias_F)
    check_linear(x_TD, weight_FD)
    num_outputs, x_TD = weight_FD.shape[0], x_TD.contiguous()
    out_TF = torch.empty((x_TD.shape[0], num_outputs), dtype=torch.float32)
    kernels().linear(handle_of(weight_FD), x_TD.data_ptr(), x_TD.shape[0], out_TF.data_ptr(), num_outputs)
    return out_TF if bias_F is None else out_TF.add_(widened(bias_F))


def serves_experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> bool:
    """Whether hidden size and width are whole vectors."""
    if trains_experts(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared):
        return True
    shared_weights = () if shared is None else shared.weights
    weights = (gate_up_E2FD, down_EDF, *shared_weights)
    return (
        take(x_TD, routing.weights_TA, *map(_grad_source, weights))
        and fits_experts(gate_up_E2FD, down_EDF)
        and all(map(fits_linear, shared_weights))
    )


def fits_experts(gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight) -> bool:
    """Whether the kernels multiply with these experts."""
    is_whole = all(size % _LANES == 0 for size in down_EDF.shape[1:])
    return is_whole and fits_linear(gate_up_E2FD) and fits_linear(down_EDF)


def experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """[T, D] fp32. See ops.experts_swiglu. Raises IndexError for an invalid expert."""
    if trains_experts(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared):
        assert isinstance(gate_up_E2FD, Tensor) and isinstance(down_EDF, Tensor)
        return train_experts(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared)
    x_TD, weights_TA, experts_TA = x_TD.contiguous(), routing.weights_TA.contiguous(), routing.experts_TA.contiguous()
    num_tokens, top_k = experts_TA.shape
    check_experts(x_TD, gate_up_E2FD, down_EDF)
    check_memory(weights_TA, torch.float32, (num_tokens, top_k))
    check_memory(experts_TA, torch.int64, (len(x_TD), top_k))
    out_TD = torch.empty_like(x_TD)
    native = kernels()
    weights, chosen = weights_TA.data_ptr(), experts_TA.data_ptr()
    routed = native.Routing(num_tokens=num_tokens, top_k=top_k, weights=weights, experts=chosen)
    gate_up, down, of_all = handle_of(gate_up_E2FD), handle_of(down_EDF), None
    if shared is not None:
        vector_D = None if shared.gate_1D is None else widened(shared.gate_1D)
        of_all = _shared_expert(shared, vector_D)
    native.experts(x_TD.data_ptr(), routed, gate_up, down, of_all, out_TD.data_ptr())
    return out_TD


def serves_combine_experts(
    rows_PD: Tensor, weights_TA: Tensor, places_TA: Tensor, shared: MadeByShared | None = None
) -> bool:
    made = () if shared is None else (shared.x_TD, shared.rows_TD)
    return take(rows_PD, weights_TA, *made) and not torch.is_grad_enabled() and rows_PD.shape[1] % _LANES == 0


def combine_experts(
    rows_PD: Tensor, weights_TA: Tensor, places_TA: Tensor, shared: MadeByShared | None = None
) -> Tensor:
    """[T, D] fp32. See ops.combine_experts. Raises IndexError for a row that is not there."""
    rows_PD, weights_TA, places_TA = rows_PD.contiguous(), weights_TA.contiguous(), places_TA.contiguous()
    num_tokens, top_k = places_TA.shape
    check_memory(rows_PD, torch.float32, rows_PD.shape)
    check_memory(weights_TA, torch.float32, (num_tokens, top_k))
    check_memory(places_TA, torch.int64, (num_tokens, top_k))
    hidden = rows_PD.shape[1]
    out_TD = torch.empty(num_tokens, hidden)
    weights, places = weights_TA.data_ptr(), places_TA.data_ptr()
    routed = kernels().Routing(num_tokens=num_tokens, top_k=top_k, weights=weights, experts=places)
    made = None
    if shared is not None:
        x_TD, made_TD = shared.x_TD.contiguous(), shared.rows_TD.contiguous()
        check_memory(x_TD, torch.float32, (num_tokens, hidden))
        check_memory(made_TD, torch.float32, (num_tokens, hidden))
        vector_D = None if shared.gate_1D is None else widened(shared.gate_1D)
        vector = 0 if vector_D is None else vector_D.data_ptr()
        made = kernels().MadeByShared(x=x_TD.data_ptr(), rows=made_TD.data_ptr(), gate_vector=vector)
    kernels().combine(rows_PD.data_ptr(), len(rows_PD), routed, hidden, made, out_TD.data_ptr())
    return out_TD


def _shared_expert(shared: SharedExpert, vector_D: Tensor | None) -> Any:
    gate, up, down = map(handle_of, shared.weights)
    vector = 0 if vector_D is None else vector_D.data_ptr()
    return kernels().SharedExpert(gate=gate, up=up, down=down, gate_vector=vector)


def _grad_source(weight: Tensor | Weight) -> Tensor | None:
    return weight if isinstance(weight, Tensor) else None


def fits_linear(weight: Tensor | Weight) -> bool:
    """Whether the kernels multiply with this weight, a matrix or a stack of matrices."""
    if isinstance(weight, (PanelWeight, RecordWeight)):
        return True
    return (
        isinstance(weight, Tensor)
        and weight.dtype in KIND_OF_FLOAT
        and weight.shape[-1] % _STEP == 0
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def handle_of(weight: Tensor | Weight) -> Any:
    """What the module calls a weight; kept beside a tensor until its memory moves. The caller keeps `weight` alive."""
    if isinstance(weight, (PanelWeight, RecordWeight)):
        return weight.handle
    assert isinstance(weight, Tensor), "ask whether it serves first"
    address = weight.data_ptr()
    kept: tuple[int, Any] | None = getattr(weight, "_native", None)
    if kept is None or kept[0] != address:
        num_experts = weight.shape[0] if weight.dim() == 3 else 1
        num_outputs, num_inputs = weight.shape[-2:]
        sizes = {"num_experts": num_experts, "num_outputs": num_outputs, "num_inputs": num_inputs}
        kept = (address, kernels().Weight(kind=KIND_OF_FLOAT[weight.dtype], data=address, **sizes))
        weight._native = kept  # type: ignore[attr-defined]
    return kept[1]
