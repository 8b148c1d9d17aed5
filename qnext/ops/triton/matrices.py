"""Products with weights that stay codes, and experts, by GPU kernels.

Legend: T tokens, A experts of a token, D inputs, F outputs or expert width, E experts, R rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.backends import is_interpreted
from qnext.ops.checks import check_experts, check_linear
from qnext.ops.float8 import Fp8Weight
from qnext.ops.quantized import QuantizedWeight
from qnext.ops.records import Routing, SharedExpert
from qnext.ops.torch.groups import group, sum_per_token, swiglu_halves
from qnext.ops.triton import forms
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.train_experts import trained_experts, trains_experts
from qnext.ops.triton.trust import DTYPES, is_trusted, numbers, take, wants_gradients
from qnext.ops.weights import Weight

_FEW_TOKENS = 8  # up to here each token reads its experts by itself
_FEW_ROWS = 64  # of a matrix of codes; for more of them its numbers are made once
_BLOCK_INPUTS = 128
_MAX_EXPERTS = 1024


class _ReadWeight(NamedTuple):
    """How a kernel reads a weight: its memory, and the constants of the program."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    constants: dict[str, Any]

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.zeros


def _is_power_of_2(size: int) -> bool:
    return size == next_power_of_2(size)


def _fits(weight: Tensor | Weight) -> bool:
    """Whether a kernel can read the weight."""
    if isinstance(weight, QuantizedWeight):
        return _is_power_of_2(weight.group_size) and all(x.is_contiguous() for x in weight.tensors)
    if isinstance(weight, Fp8Weight):
        return _is_power_of_2(weight.block[1]) and all(x.is_contiguous() for x in weight.tensors)
    return isinstance(weight, Tensor) and weight.dtype in DTYPES and weight.is_contiguous()


def _read(weight: Tensor | Weight) -> _ReadWeight:
    if isinstance(weight, Tensor):
        return _ReadWeight(weight, weight, weight, _constants(forms.FLOATS, _BLOCK_INPUTS))
    if isinstance(weight, Fp8Weight):
        return _ReadWeight(
            weight.codes, weight.scales, weight.codes, _constants(forms.FP8, weight.block[1], rows=weight.block[0])
        )
    assert isinstance(weight, QuantizedWeight), "ask whether it serves first"
    kind = forms.INT4 if weight.bits == 4 else forms.INT8
    zeros = weight.codes if weight.zeros is None else weight.zeros
    constants = _constants(kind, weight.group_size, has_zeros=weight.zeros is not None)
    return _ReadWeight(weight.codes, weight.scales, zeros, constants)


def _constants(form: int, group_size: int, *, rows: int = 1, has_zeros: bool = False) -> dict[str, Any]:
    block = max(_BLOCK_INPUTS, group_size)
    return {"FORM": form, "HAS_ZEROS": has_zeros, "SCALE_ROWS": rows, "GROUP": group_size, "BLOCK_D": block}


def serves_linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> bool:
    """Whether the weight is codes, and the rows are few: floats are multiplied best by torch."""
    return (
        not isinstance(weight_FD, Tensor)
        and _fits(weight_FD)
        and bias_F is None
        and x_TD.dim() == 2
        and 0 < len(x_TD) <= _FEW_ROWS
        and take(x_TD)
        and is_trusted(try_linear, x_TD.device)
    )


def linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> Tensor:
    """See ops.linear. The numbers of the weight are rounded to the dtype of x; sums are fp32."""
    from qnext.ops.triton.kernels.matrices import linear_codes_kernel

    check_linear(x_TD, weight_FD)
    assert bias_F is None, "ask whether it serves first"
    form = _read(weight_FD)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    (num_rows, num_inputs), num_outputs = x_TD.shape, weight_FD.shape[0]
    out_TF = torch.empty((num_rows, num_outputs), dtype=x_TD.dtype, device=x_TD.device)
    block_rows, block_outputs = 16, 32
    linear_codes_kernel[(-(-num_outputs // block_outputs), -(-num_rows // block_rows))](
        x_TD,
        *form.memory,
        out_TF,
        x_TD.stride(0),
        num_rows,
        num_outputs,
        num_inputs,
        **form.constants,
        IS_WIDE=x_TD.dtype == torch.float32 or is_interpreted(),
        BLOCK_T=block_rows,
        BLOCK_F=block_outputs,
        num_warps=4,
    )
    return out_TF


def serves_experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> bool:
    """Whether the experts are codes, or the tokens are few: many rows of floats are multiplied best by torch."""
    weights = (gate_up_E2FD, down_EDF)
    tensors = [x for x in weights if isinstance(x, Tensor)]
    if wants_gradients(x_TD, routing.weights_TA, *tensors):
        return trains_experts(x_TD, gate_up_E2FD, down_EDF, routing)
    return (
        all(map(_fits, weights))
        and len(x_TD) > 0
        and (len(x_TD) <= _FEW_TOKENS or not any(isinstance(x, Tensor) for x in weights))
        and down_EDF.shape[0] <= _MAX_EXPERTS
        and take(x_TD, routing.weights_TA, *tensors)
        and is_trusted(try_experts_swiglu, x_TD.device)
    )


def experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """See ops.experts_swiglu. Few tokens: fp32 throughout, cast once. Many: products in the dtype of x, as in torch.

    A GPU is not waited for: a token with an expert that does not exist becomes NaN.
    """
    check_experts(x_TD, gate_up_E2FD, down_EDF)
    if wants_gradients(x_TD, routing.weights_TA, *(x for x in (gate_up_E2FD, down_EDF) if isinstance(x, Tensor))):
        return trained_experts(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    rows_TD, gate_T1 = _shared_rows(x_TD, shared)
    if len(x_TD) <= _FEW_TOKENS:
        return _of_few(x_TD, _read(gate_up_E2FD), _read(down_EDF), routing, rows_TD, gate_T1)
    is_expert_TA = (routing.experts_TA >= 0) & (routing.experts_TA < down_EDF.shape[0])
    weights_TA = torch.where(is_expert_TA, routing.weights_TA, torch.nan)
    groups = group(torch.where(is_expert_TA, routing.experts_TA, 0), down_EDF.shape[0])
    hidden_RF = _grouped(x_TD, gate_up_E2FD, groups.ends_E, groups.tokens_A)
    weights_R1 = torch.empty_like(weights_TA).view(-1, 1)
    weights_R1[groups.places_TA.flatten()] = weights_TA.view(-1, 1)
    scaled_RF = swiglu_halves(hidden_RF.float()).mul_(weights_R1).to(x_TD.dtype)
    out_TD = sum_per_token(_grouped(scaled_RF, down_EDF, groups.ends_E, None), groups)
    if rows_TD is None:
        return out_TD
    return out_TD + (rows_TD if gate_T1 is None else torch.sigmoid(gate_T1) * rows_TD)


def _shared_rows(x_TD: Tensor, shared: SharedExpert | None) -> tuple[Tensor | None, Tensor | None]:
    """What the shared expert makes of the rows, and the scores that scale it."""
    if shared is None:
        return None, None

    def times(x: Tensor, weight: Tensor | Weight) -> Tensor:
        return linear(x, weight) if serves_linear(x, weight) else _by_torch(x, weight)

    inner_TF = torch.nn.functional.silu(times(x_TD, shared.gate_proj_FD)) * times(x_TD, shared.up_proj_FD)
    rows_TD = times(inner_TF, shared.down_proj_DF)
    return rows_TD, None if shared.gate_1D is None else times(x_TD, shared.gate_1D)


def _by_torch(x_TD: Tensor, weight_FD: Tensor | Weight) -> Tensor:
    from qnext.ops.torch.matrices import linear as torch_linear

    return torch_linear(x_TD, weight_FD)


def _of_few(
    x_TD: Tensor,
    gate_up: _ReadWeight,
    down: _ReadWeight,
    routing: Routing,
    shared_TD: Tensor | None,
    gate_T1: Tensor | None,
) -> Tensor:
    from qnext.ops.triton.kernels.experts import experts_inner_kernel, experts_output_kernel

    (num_tokens, hidden), top_k = x_TD.shape, routing.experts_TA.shape[1]
    width = gate_up.codes.shape[1] // 2
    weights_TA, experts_TA = routing.weights_TA.float().contiguous(), routing.experts_TA.contiguous()
    inner_PF = torch.empty((num_tokens * top_k, width), dtype=torch.float32, device=x_TD.device)
    block = 16
    experts_inner_kernel[(num_tokens * top_k, -(-width // block))](
        x_TD,
        *gate_up.memory,
        experts_TA,
        inner_PF,
        x_TD.stride(0),
        top_k,
        width,
        hidden,
        gate_up.codes.shape[0],
        **gate_up.constants,
        BLOCK_F=block,
        num_warps=4,
    )
    out_TD = torch.empty((num_tokens, hidden), dtype=x_TD.dtype, device=x_TD.device)
    experts_output_kernel[(num_tokens, -(-hidden // block))](
        inner_PF,
        *down.memory,
        experts_TA,
        weights_TA,
        out_TD if shared_TD is None else shared_TD.contiguous(),
        out_TD if gate_T1 is None else gate_T1.contiguous(),
        out_TD,
        top_k,
        width,
        hidden,
        down.codes.shape[0],
        **down.constants,
        HAS_SHARED=shared_TD is not None,
        HAS_SHARED_GATE=gate_T1 is not None,
        BLOCK_F=block,
        num_warps=4,
    )
    return out_TD


def _grouped(x: Tensor, weight: Tensor | Weight, ends_E: Tensor, tokens_R: Tensor | None) -> Tensor:
    """[R, F]: sorted rows, or the rows of their tokens, times the matrix of their expert."""
    from qnext.ops.triton.kernels.matrices import grouped_codes_kernel

    form = _read(weight)
    num_experts, num_outputs, num_inputs = weight.shape
    num_rows = len(x) if tokens_R is None else len(tokens_R)
    out_RF = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    block_rows, block_outputs = 32, 64
    num_tiles = min(num_experts, num_rows) + num_rows // block_rows
    grouped_codes_kernel[(-(-num_outputs // block_outputs), num_tiles)](
        x,
        ends_E if tokens_R is None else tokens_R,
        *form.memory,
        ends_E,
        out_RF,
        x.stride(0),
        num_experts,
        num_outputs,
        num_inputs,
        **form.constants,
        HAS_TOKENS=tokens_R is not None,
        IS_WIDE=x.dtype == torch.float32 or is_interpreted(),
        BLOCK_T=block_rows,
        BLOCK_F=block_outputs,
        BLOCK_E=next_power_of_2(num_experts),
        num_warps=8,
        num_stages=2,
    )
    return out_RF


def try_linear(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD = numbers(3, 96, seed=0, device=device)
    for weight in _try_weights((20, 96), device):
        yield linear(x_TD, weight), reference.linear(x_TD, weight)


def try_experts_swiglu(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Few tokens, and more than few for codes."""
    pairs: list[tuple[Tensor | Weight, Tensor | Weight]]
    pairs = [(numbers(3, 64, 96, seed=3, device=device), numbers(3, 96, 32, seed=4, device=device))]
    pairs += zip(_try_weights((3, 64, 96), device), _try_weights((3, 96, 32), device), strict=True)
    for gate_up, down in pairs:
        for num_tokens in (2,) if isinstance(down, Tensor) else (2, _FEW_TOKENS + 1):
            x_TD = numbers(num_tokens, 96, seed=0, device=device)
            scores_TE = numbers(num_tokens, 3, seed=1, device=device)
            routing = reference.route(scores_TE, top_k=2, norm_topk_prob=True)
            wanted = reference.experts_swiglu(x_TD, gate_up, down, routing=routing)
            yield experts_swiglu(x_TD, gate_up, down, routing=routing), wanted


def _try_weights(shape: tuple[int, ...], device: torch.device) -> Iterator[Weight]:
    """Codes of every kind."""
    numbers_FD = numbers(*shape, seed=5, device=device)
    for bits, columns in ((4, shape[-1] // 2), (8, shape[-1])):
        codes = (numbers(*shape[:-1], columns, seed=6, device=device) * 50 + 128).clamp(0, 255).to(torch.uint8)
        scales = numbers(*shape[:-1], shape[-1] // 16, seed=7, device=device, scale=0.1)
        yield QuantizedWeight(codes, scales, bits, 16)
    blocks = tuple(-(-size // 16) for size in shape[-2:])
    scales = numbers(*shape[:-2], *blocks, seed=8, device=device)
    yield Fp8Weight(numbers_FD.to(torch.float8_e4m3fn), scales, (16, 16))
