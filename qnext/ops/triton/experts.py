"""Routed experts and the shared one, by GPU kernels.

Legend: T tokens, A experts of a token, D hidden, F expert width, E experts, R rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.backends import is_interpreted
from qnext.ops.checks import check_experts, check_same_shape
from qnext.ops.records import Routing, SharedExpert
from qnext.ops.torch.groups import group, sum_per_token
from qnext.ops.torch.matrices import linear as torch_linear
from qnext.ops.triton import forms
from qnext.ops.triton.codes import ReadWeight, fits, read, weights_to_try
from qnext.ops.triton.matrices import add_linear, linear, serves_add_linear, serves_linear, side_by_side
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.train_experts import trained_experts, trains_experts, weighted_swiglu
from qnext.ops.triton.trust import is_trusted, numbers, take, wants_gradients
from qnext.ops.weights import Weight

_FEW_TOKENS = 8  # up to here each token reads its experts by itself
_MAX_EXPERTS = 1024
# Of a program: many programs, each of which asks for some KB of weights at a time.
_BLOCK_INNER, _BLOCK_OUTPUTS = 16, 4


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
        all(map(fits, weights))
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
    if len(x_TD) <= _FEW_TOKENS:
        return _of_few(x_TD, gate_up_E2FD, down_EDF, routing, shared, None)
    x_TD = side_by_side(x_TD)
    is_expert_TA = (routing.experts_TA >= 0) & (routing.experts_TA < down_EDF.shape[0])
    weights_TA = torch.where(is_expert_TA, routing.weights_TA, torch.nan)
    groups = group(torch.where(is_expert_TA, routing.experts_TA, 0), down_EDF.shape[0])
    hidden_RF = _grouped(x_TD, gate_up_E2FD, groups.ends_E, groups.tokens_A)
    weights_R = torch.empty(weights_TA.numel(), dtype=torch.float32, device=x_TD.device)
    weights_R[groups.places_TA.flatten()] = weights_TA.flatten()
    gate_RF, up_RF = hidden_RF.chunk(2, dim=1)
    scaled_RF = weighted_swiglu(gate_RF, up_RF, weights_R)
    out_TD = sum_per_token(_grouped(scaled_RF, down_EDF, groups.ends_E, None), groups)
    return out_TD if shared is None else _with_shared(out_TD, x_TD, shared)


def serves_add_experts(
    residual_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> bool:
    """Whether the tokens are few, and nothing wants gradients."""
    tensors = [x for x in (gate_up_E2FD, down_EDF) if isinstance(x, Tensor)]
    return (
        len(x_TD) <= _FEW_TOKENS
        and residual_TD.dtype == x_TD.dtype
        and not wants_gradients(residual_TD, x_TD, routing.weights_TA, *tensors)
        and serves_experts_swiglu(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared)
    )


def add_experts(
    residual_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """See ops.add_experts. Everything is fp32 and cast once. A token with an expert that does not exist becomes NaN."""
    check_experts(x_TD, gate_up_E2FD, down_EDF)
    check_same_shape(residual_TD, x_TD)
    return _of_few(x_TD, gate_up_E2FD, down_EDF, routing, shared, residual_TD)


def _with_shared(residual_TD: Tensor, x_TD: Tensor, shared: SharedExpert) -> Tensor:
    """[T, D]: what the shared expert makes of each row, added to something. What scales it scales its inner numbers."""

    def times(x: Tensor, weight: Tensor | Weight) -> Tensor:
        return linear(x, weight) if serves_linear(x, weight) else torch_linear(x, weight)

    gate_TF, up_TF = times(x_TD, shared.gate_proj_FD), times(x_TD, shared.up_proj_FD)
    scale_T = None if shared.gate_1D is None else torch.sigmoid(times(x_TD, shared.gate_1D).float()).flatten()
    inner_TF, down_DF = weighted_swiglu(gate_TF, up_TF, scale_T), shared.down_proj_DF
    if serves_add_linear(residual_TD, inner_TF, down_DF):
        return add_linear(residual_TD, inner_TF, down_DF)
    return residual_TD + times(inner_TF, down_DF)


def _is_readable(shared: SharedExpert) -> bool:
    """Whether the shared expert can be computed beside the routed ones: gate and up are of one kind."""
    if not all(map(fits, shared.weights)) or not (shared.gate_1D is None or fits(shared.gate_1D)):
        return False
    gate, up, _ = map(read, shared.weights)
    return gate.form == up.form and gate.codes.dtype == up.codes.dtype


class _ReadExperts(NamedTuple):
    """Those of a call of few tokens, and the shared one where it is computed beside them."""

    gate_up: ReadWeight
    down: ReadWeight
    shared: tuple[ReadWeight, ReadWeight, ReadWeight] | None
    scale_1D: Tensor | None  # what scales the shared one: sigmoid(scale x)

    @property
    def widths(self) -> tuple[int, int]:
        """Of each routed expert, and of the shared one."""
        return self.gate_up.codes.shape[1] // 2, 0 if self.shared is None else self.shared[0].codes.shape[0]


def _of_few(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    routing: Routing,
    shared: SharedExpert | None,
    residual_TD: Tensor | None,
) -> Tensor:
    """In two starts: inner numbers of all experts of all tokens, then the sums of what is made of them."""
    if shared is not None and not _is_readable(shared):
        residual_TD = _with_shared(torch.zeros_like(x_TD) if residual_TD is None else residual_TD, x_TD, shared)
        shared = None
    gate_up, down = read(gate_up_E2FD), read(down_EDF)
    if shared is None:
        experts = _ReadExperts(gate_up, down, None, None)
    else:
        parts = read(shared.gate_proj_FD), read(shared.up_proj_FD), read(shared.down_proj_DF)
        experts = _ReadExperts(gate_up, down, parts, shared.gate_1D)
    routing = Routing(routing.weights_TA.float().contiguous(), routing.experts_TA.contiguous())
    return _sums(_inner_numbers(side_by_side(x_TD), experts, routing), experts, routing, x_TD, residual_TD)


def _inner_numbers(x_TD: Tensor, experts: _ReadExperts, routing: Routing) -> tuple[Tensor, Tensor]:
    """Of the routed experts [T * A, F] and of the shared one [T, F], in fp32."""
    from qnext.ops.triton.kernels.experts import experts_inner_kernel

    (num_tokens, hidden), top_k, shared, scale_1D = x_TD.shape, routing.experts_TA.shape[1], *experts[2:]
    width, shared_width = experts.widths
    inner_PF, shared_TF = (
        torch.empty(shape, dtype=torch.float32, device=x_TD.device)
        for shape in ((num_tokens * top_k, width), (num_tokens, shared_width))
    )
    gate, up, _ = shared or (experts.gate_up,) * 3
    num_rows = num_tokens * (top_k + (shared is not None))
    experts_inner_kernel[(num_rows, -(-max(width, shared_width) // _BLOCK_INNER))](
        x_TD,
        *experts.gate_up.memory,
        routing.experts_TA,
        inner_PF,
        *gate.memory,
        *up.memory,
        x_TD if scale_1D is None else scale_1D,
        shared_TF,
        x_TD.stride(0),
        top_k,
        num_tokens * top_k,
        width,
        shared_width,
        hidden,
        experts.gate_up.codes.shape[0],
        ROUTED=experts.gate_up.form.at_least(512),
        SHARED=None if shared is None else gate.form.at_least(512),
        HAS_SHARED_SCALE=scale_1D is not None,
        BLOCK_F=_BLOCK_INNER,
        num_warps=8,
    )
    return inner_PF, shared_TF


def _sums(
    inner: tuple[Tensor, Tensor], experts: _ReadExperts, routing: Routing, x_TD: Tensor, residual_TD: Tensor | None
) -> Tensor:
    """[T, D] in the dtype of x: what all experts make of the inner numbers, and the residual."""
    from qnext.ops.triton.kernels.experts import experts_output_kernel

    (num_tokens, hidden), top_k, shared = x_TD.shape, routing.experts_TA.shape[1], experts.shared
    out_TD = torch.empty((num_tokens, hidden), dtype=x_TD.dtype, device=x_TD.device)
    added_TD = out_TD if residual_TD is None else side_by_side(residual_TD)
    of_shared = experts.down if shared is None else shared[2]
    # Numbers for which a program has not enough registers twice.
    is_large = experts.down.form.form == forms.INT4 or experts.down.codes.dtype == torch.float32
    experts_output_kernel[(num_tokens, -(-hidden // _BLOCK_OUTPUTS))](
        inner[0],
        *experts.down.memory,
        routing.experts_TA,
        routing.weights_TA,
        inner[1],
        *of_shared.memory,
        added_TD,
        out_TD,
        added_TD.stride(0),
        top_k,
        *experts.widths,
        hidden,
        experts.down.codes.shape[0],
        ROUTED=experts.down.form.at_least(128 if is_large else 256),
        SHARED=None if shared is None else of_shared.form.at_least(512),
        HAS_RESIDUAL=residual_TD is not None,
        BLOCK_A=next_power_of_2(top_k),
        BLOCK_F=_BLOCK_OUTPUTS,
        num_warps=4,
    )
    return out_TD


def _grouped(x: Tensor, weight: Tensor | Weight, ends_E: Tensor, tokens_R: Tensor | None) -> Tensor:
    """[R, F]: sorted rows, or the rows of their tokens, times the matrix of their expert."""
    from qnext.ops.triton.kernels.matrices import grouped_codes_kernel

    readable = read(weight)
    num_experts, num_outputs, num_inputs = weight.shape
    num_rows = len(x) if tokens_R is None else len(tokens_R)
    out_RF = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    block_rows, block_outputs = 32, 64
    num_tiles = min(num_experts, num_rows) + num_rows // block_rows
    grouped_codes_kernel[(-(-num_outputs // block_outputs), num_tiles)](
        x,
        ends_E if tokens_R is None else tokens_R,
        *readable.memory,
        ends_E,
        out_RF,
        x.stride(0),
        num_experts,
        num_outputs,
        num_inputs,
        FORM=readable.form.at_least(128),
        HAS_TOKENS=tokens_R is not None,
        IS_WIDE=x.dtype == torch.float32 or is_interpreted(),
        BLOCK_T=block_rows,
        BLOCK_F=block_outputs,
        BLOCK_E=next_power_of_2(num_experts),
        num_warps=8,
        num_stages=2,
    )
    return out_RF


def try_experts_swiglu(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Few tokens with a shared expert and a residual, and more than few for codes."""
    shapes = ((3, 32, 32), (3, 32, 16), (32, 32))
    for gate_up, down, shared_down in zip(*(_to_try(shape, device) for shape in shapes), strict=True):
        for num_tokens in (2,) if isinstance(down, Tensor) else (2, _FEW_TOKENS + 1):
            x_TD, residual_TD = (numbers(num_tokens, 32, seed=seed, device=device) for seed in (0, 9))
            routing = reference.route(numbers(num_tokens, 3, seed=1, device=device), top_k=2, norm_topk_prob=True)
            if num_tokens > _FEW_TOKENS:
                wanted = reference.experts_swiglu(x_TD, gate_up, down, routing=routing)
                yield experts_swiglu(x_TD, gate_up, down, routing=routing), wanted
                continue
            shared = SharedExpert(gate_up[0], gate_up[1], shared_down, numbers(1, 32, seed=2, device=device))
            how: Any = {"routing": routing, "shared": shared}
            wanted = residual_TD + reference.experts_swiglu(x_TD, gate_up, down, **how)
            yield add_experts(residual_TD, x_TD, gate_up, down, **how), wanted


def _to_try(shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor | Weight]:
    yield numbers(*shape, seed=3, device=device)
    yield from weights_to_try(shape, device)
