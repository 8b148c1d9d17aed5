"""Dense layers and experts by native kernels.

Legend: T tokens, D hidden or inputs, F outputs or expert width, E experts, A experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.cpu.panels import KIND_OF_FLOAT, PanelWeight, Weight

_STEP = 32  # inputs that the kernels for floats take at a time
_LANES = 16


def fits_weight(weight: Weight) -> bool:
    """Whether the kernels multiply with this weight, a matrix or a stack of matrices."""
    if isinstance(weight, PanelWeight):
        return True
    return (
        isinstance(weight, Tensor)
        and weight.dtype in KIND_OF_FLOAT
        and weight.shape[-1] % _STEP == 0
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def handle_of(native: Any, weight: Weight) -> Any:
    """What the module calls a weight; kept beside a tensor until its memory moves. The caller keeps `weight` alive."""
    if isinstance(weight, PanelWeight):
        return weight.handle
    assert isinstance(weight, Tensor), "ask fits_weight first"
    address = weight.data_ptr()
    kept: tuple[int, Any] | None = getattr(weight, "_native", None)
    if kept is None or kept[0] != address:
        shape = weight.shape
        num_experts = shape[0] if len(shape) == 3 else 1
        kind = KIND_OF_FLOAT[weight.dtype]
        kept = (address, native.Weight(kind, num_experts, shape[-2], shape[-1], address, 0, 0, 0, _LANES))
        weight._native = kept  # type: ignore[attr-defined]
    return kept[1]


def linear(native: Any, x_TD: Tensor, weight_FD: Weight) -> Tensor:
    """[T, F] fp32: x W^T. See ops.linear."""
    num_outputs, num_inputs = weight_FD.shape
    if x_TD.shape[-1] != num_inputs:
        raise ValueError(f"rows of {x_TD.shape[-1]} numbers do not fit a weight of {num_inputs} inputs")
    x_TD = x_TD.contiguous()
    out_TF = torch.empty((x_TD.shape[0], num_outputs), dtype=torch.float32)
    native.linear(handle_of(native, weight_FD), x_TD.data_ptr(), x_TD.shape[0], out_TF.data_ptr(), num_outputs)
    return out_TF


def experts(
    native: Any,
    x_TD: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    weights_TA: Tensor,
    experts_TA: Tensor,
    shared: tuple[Weight, Weight, Weight, Tensor | None] | None,
) -> Tensor:
    """[T, D] fp32; `shared` is gate, up, down and the fp32 gate vector [D]. See ops.experts_swiglu.

    Raises IndexError for an expert that is none.
    """
    x_TD, weights_TA, experts_TA = x_TD.contiguous(), weights_TA.contiguous(), experts_TA.contiguous()
    num_tokens, top_k = experts_TA.shape
    assert weights_TA.dtype == torch.float32 and experts_TA.dtype == torch.int64
    _check_expert_shapes(x_TD, gate_up_E2FD.shape, down_EDF.shape)
    out_TD = torch.empty_like(x_TD)
    gate = up = down = None
    vector = 0
    if shared is not None:
        gate, up, down = (handle_of(native, weight) for weight in shared[:3])
        vector = 0 if shared[3] is None else shared[3].data_ptr()
    native.experts(
        x_TD.data_ptr(), num_tokens, top_k, weights_TA.data_ptr(), experts_TA.data_ptr(),
        handle_of(native, gate_up_E2FD), handle_of(native, down_EDF), gate, up, down, vector, out_TD.data_ptr(),
    )  # fmt: skip
    return out_TD


def _check_expert_shapes(x_TD: Tensor, gate_up: torch.Size, down: torch.Size) -> None:
    num_experts, hidden, width = down
    if gate_up != (num_experts, 2 * width, hidden) or x_TD.shape[1] != hidden:
        raise ValueError(f"experts of shapes {list(gate_up)} and {list(down)} do not fit rows of {x_TD.shape[1]}")


def fits_experts(gate_up_E2FD: Weight, down_EDF: Weight) -> bool:
    """Whether the kernels take these experts: whole vectors in hidden size and width."""
    sizes_fit = all(size % _LANES == 0 for size in down_EDF.shape[1:])
    return sizes_fit and fits_weight(gate_up_E2FD) and fits_weight(down_EDF)
