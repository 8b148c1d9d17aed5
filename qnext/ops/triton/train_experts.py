"""SwiGLU and routed experts with their gradients: PyTorch's grouped products, and GPU kernels between them.

Legend: T tokens, D hidden, E experts, F expert width, A assignments sorted by expert. What lies between the products
moves 3 F + 7 F numbers of an assignment, forward and backward, where PyTorch's steps move about thirty.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops import reference
from qnext.ops.checks import check_same_shape
from qnext.ops.records import Routing, SharedExpert
from qnext.ops.torch.groups import Groups, group, grouped_mm, grouped_outer, sum_per_token
from qnext.ops.torch.matrices import is_frozen, linear
from qnext.ops.triton.sizes import next_power_of_2, num_warps
from qnext.ops.triton.trust import compared, is_trusted, numbers, take, train, wants_gradients
from qnext.ops.weights import Weight

_MAX_BLOCK = 4096


def serves_swiglu(gate: Tensor, up: Tensor) -> bool:
    """Whether there are numbers, in rows that lie in order."""
    if gate.numel() == 0 or gate.dtype != up.dtype or gate.dim() != 2:
        return False
    serves = train(gate, up) if wants_gradients(gate, up) else take(gate, up)
    return serves and is_trusted(try_swiglu_gradient, gate.device)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See ops.swiglu. Computed in fp32 and cast once."""
    check_same_shape(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
        ctx.save_for_backward(gate, up)
        return weighted_swiglu(gate, up, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty((len(gate), 2 * gate.shape[1]), dtype=gate.dtype, device=gate.device)
        _swiglu_backward((gate, up), None, grad, grads)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        return grad_gate, grad_up


def weighted_swiglu(gate: Tensor, up: Tensor, weights_A: Tensor | None) -> Tensor:
    """silu(gate) * up of rows whose numbers lie side by side, times a weight of the row, fp32, where there are such."""
    from qnext.ops.triton.kernels.swiglu import swiglu_kernel

    num_rows, width = gate.shape
    out = torch.empty((num_rows, width), dtype=gate.dtype, device=gate.device)
    block = min(_MAX_BLOCK, next_power_of_2(width))
    swiglu_kernel[(num_rows, -(-width // block))](
        gate,
        up,
        out if weights_A is None else weights_A,
        out,
        gate.stride(0),
        up.stride(0),
        width,
        HAS_WEIGHTS=weights_A is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


def _swiglu_backward(
    halves: tuple[Tensor, Tensor], weights_A: Tensor | None, grad: Tensor, grads_A2F: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of gate, then of up. With weights, gives theirs and the rows times their weights."""
    from qnext.ops.triton.kernels.swiglu import swiglu_backward_kernel

    gate, up = halves
    num_rows, width = gate.shape
    grad, block = grad.contiguous(), min(_MAX_BLOCK, next_power_of_2(width))
    grad_weights_A, out = grad, grad
    if weights_A is not None:
        grad_weights_A = torch.empty(num_rows, dtype=torch.float32, device=grad.device)
        out = torch.empty((num_rows, width), dtype=gate.dtype, device=gate.device)
    swiglu_backward_kernel[(num_rows,)](
        gate,
        up,
        grad if weights_A is None else weights_A,
        grad,
        grads_A2F,
        grads_A2F[:, width:],
        grad_weights_A,
        out,
        gate.stride(0),
        up.stride(0),
        grads_A2F.stride(0),
        width,
        HAS_WEIGHTS=weights_A is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return grad_weights_A, out


def trains_experts(x_TD: Tensor, gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight, routing: Routing) -> bool:
    """Whether the experts are floats, of which some learn."""
    if not isinstance(gate_up_E2FD, Tensor) or not isinstance(down_EDF, Tensor) or len(x_TD) == 0:
        return False
    tensors = (x_TD, gate_up_E2FD, down_EDF, routing.weights_TA)
    learns = not (is_frozen(gate_up_E2FD) and is_frozen(down_EDF))
    return learns and train(*tensors) and is_trusted(try_experts_gradient, x_TD.device)


def trained_experts(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """See ops.experts_swiglu. Under autocast products are in its dtype, and so is the result."""
    device = x_TD.device.type
    rows_TD = x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
    out_TD = _GroupedExperts.apply(rows_TD, gate_up_E2FD, down_EDF, routing.weights_TA, routing.experts_TA)
    if shared is None:
        return out_TD
    inner_TF = swiglu(linear(x_TD, shared.gate_proj_FD), linear(x_TD, shared.up_proj_FD))
    shared_TD = linear(inner_TF, shared.down_proj_DF)
    if shared.gate_1D is not None:
        shared_TD = torch.sigmoid(linear(x_TD, shared.gate_1D)) * shared_TD
    return out_TD + shared_TD


class _GroupedExperts(torch.autograd.Function):
    """Weights scale the activations, which are narrower than the output. Activations are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        groups = group(experts, len(gate_up))
        with torch.autocast(x.device.type, enabled=False):
            ctx.dtypes = gate_up.dtype, down.dtype, weights.dtype
            gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
            x_AD = x.index_select(0, groups.tokens_A)
            hidden = grouped_mm(x_AD, gate_up.transpose(1, 2), groups)
            weights_A = torch.empty(weights.numel(), dtype=torch.float32, device=x.device)
            weights_A[groups.places_TA.flatten()] = weights.flatten().float()
            gate, up = hidden.chunk(2, dim=-1)
            out_AD = grouped_mm(weighted_swiglu(gate, up, weights_A), down.transpose(1, 2), groups)
            ctx.save_for_backward(x_AD, hidden, gate_up, down, weights_A)
            ctx.groups = groups
            return sum_per_token(out_AD, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, hidden, gate_up, down, weights_A = ctx.saved_tensors
        groups: Groups = ctx.groups
        with torch.autocast(x_AD.device.type, enabled=False):
            grad_A = grad_out.to(x_AD.dtype).index_select(0, groups.tokens_A)
            grad_hidden = torch.empty_like(hidden)
            grad_scaled = grouped_mm(grad_A, down, groups)
            gate, up = hidden.chunk(2, dim=-1)
            grad_weights_A, inner = _swiglu_backward((gate, up), weights_A, grad_scaled, grad_hidden)
            grad_down = grouped_outer(grad_A, inner, groups)
            grad_gate_up = grouped_outer(grad_hidden, x_AD, groups)
            grad_x = sum_per_token(grouped_mm(grad_hidden, gate_up, groups), groups)
        grad_weights = grad_weights_A[groups.places_TA]
        cast = (g.to(kind) for g, kind in zip((grad_gate_up, grad_down, grad_weights), ctx.dtypes, strict=True))
        return grad_x, *cast, None


def try_swiglu_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    rows = (numbers(3, 72, seed=seed, device=device) for seed in (0, 1))
    yield from compared(swiglu, reference.swiglu, *rows)


def try_experts_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """One expert gets no token."""
    experts_TA = torch.tensor([[0, 2], [3, 0], [2, 3]], device=device)
    tensors = (
        numbers(3, 16, seed=0, device=device),
        numbers(4, 16, 16, seed=1, device=device, scale=0.3),
        numbers(4, 16, 8, seed=2, device=device, scale=0.3),
        numbers(3, 2, seed=3, device=device).sigmoid(),
    )

    def of(op: Any, x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TA: Tensor) -> Tensor:
        out_TD: Tensor = op(x_TD, gate_up_E2FD, down_EDF, routing=Routing(weights_TA, experts_TA))
        return out_TD

    yield from compared(partial(of, trained_experts), partial(of, reference.experts_swiglu), *tensors)
