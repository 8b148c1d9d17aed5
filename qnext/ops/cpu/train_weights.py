"""Dense layers, experts and the head with gradients, in fp32, by native kernels.

Weights are read as they lie: they are new in every step. The threads of the pool take part where torch has more than
one for the calling thread.

Legend: T tokens, R rows, D hidden or inputs, F outputs or expert width, E experts, A experts per token, Y vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.checks import check_experts, check_linear
from qnext.ops.cpu.kernels import check_memory, kernels, run_on
from qnext.ops.records import Routing, SharedExpert
from qnext.ops.weights import Weight

_LANES = 16
# Logits that exist at a time. More rows read and write the weight and its gradient less often; beyond, nothing is won.
_CHUNK_LOGITS, _MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 1 << 22, 64, 512


def trains(*tensors: Tensor | Weight | None) -> bool:
    """Whether these are fp32 on the CPU and gradients of some are wanted, outside autocast."""
    present = [each for each in tensors if each is not None]
    return (
        torch.is_grad_enabled()
        and run_on(torch.device("cpu"))
        and not torch.is_autocast_enabled("cpu")
        and all(isinstance(t, Tensor) and t.dtype == torch.float32 and t.is_cpu for t in present)
        and any(isinstance(t, Tensor) and t.requires_grad for t in present)
    )


def _is_shared() -> bool:
    return torch.get_num_threads() > 1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# ---- dense layers ----


def trains_linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> bool:
    return x_TD.dim() == 2 and trains(x_TD, weight_FD, bias_F)


def train_linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    check_linear(x_TD, weight_FD)
    out_TF = _DenseProduct.apply(x_TD, weight_FD)
    return out_TF if bias_F is None else out_TF + bias_F


class _DenseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_FD)
        return _product(x_TD, weight_FD.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_FD = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = _product(grad_TF, weight_FD) if needs_x else None
        grad_weight = _product(grad_TF.t(), x_TD) if needs_weight else None
        return grad_x, grad_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two fp32 matrices. Transposed ones are read as they lie."""
    (rows, inner), columns = a.shape, b.shape[1]
    out = torch.empty(rows, columns)
    left, right = _readable(a), _readable(b)
    sizes = {"rows": rows, "columns": columns, "inner": inner}
    kernels().multiply_dense(_handle(left), _handle(right), **sizes, out=out.data_ptr(), is_shared=_is_shared())
    return out


def _readable(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows or its columns lie in one piece each, else a copy."""
    return matrix if 1 in matrix.stride() and 0 not in matrix.stride() else matrix.contiguous()


def _handle(matrix: Tensor) -> Any:
    by_row, by_column = matrix.stride()
    is_transposed = by_column != 1
    return kernels().Dense(
        matrix.data_ptr(), stride=by_column if is_transposed else by_row, is_transposed=is_transposed
    )


# ---- experts ----


def trains_experts(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> bool:
    """Whether hidden size and widths are whole vectors."""
    of_shared = () if shared is None else (*shared.weights, shared.gate_1D)
    widths = (*down_EDF.shape[1:], *(() if shared is None else shared.gate_proj_FD.shape[:1]))
    return (
        x_TD.dim() == 2
        and trains(x_TD, gate_up_E2FD, down_EDF, routing.weights_TA, *of_shared)
        and all(size % _LANES == 0 for size in widths)
    )


def train_experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, *, routing: Routing, shared: SharedExpert | None = None
) -> Tensor:
    """[T, D]. See ops.experts_swiglu. Raises IndexError for an invalid expert."""
    check_experts(x_TD, gate_up_E2FD, down_EDF)
    of_shared: tuple[Any, ...] = (None, None, None)
    if shared is not None:
        gate_up_2FD = torch.cat([shared.gate_proj_FD, shared.up_proj_FD])  # type: ignore[list-item]
        of_shared = (gate_up_2FD, shared.down_proj_DF, shared.gate_1D)
        check_experts(x_TD, gate_up_2FD[None], shared.down_proj_DF[None])  # type: ignore[index]
    return _SparseExperts.apply(x_TD, gate_up_E2FD, down_EDF, routing.weights_TA, *of_shared, routing.experts_TA)


class _Gradients(NamedTuple):
    """Of the inputs of experts; None where one is not wanted. That of the rows and the routing always is."""

    x: Tensor
    gate_up: Tensor | None
    down: Tensor | None
    weights: Tensor
    shared_gate_up: Tensor | None
    shared_down: Tensor | None
    gate_vector: Tensor | None


class _SparseExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        kept = [None if each is None else each.contiguous() for each in inputs]
        x, gate_up, _, _, shared_gate_up, _, gate_vector, experts = kept
        assert x is not None and gate_up is not None and experts is not None
        hidden = x.new_empty(experts.numel(), gate_up.shape[1])
        shared_hidden = None if shared_gate_up is None else x.new_empty(len(x), len(shared_gate_up))
        scales = None if gate_vector is None else x.new_empty(len(x))
        saved = (*kept, hidden, shared_hidden, scales)
        ctx.save_for_backward(*saved)
        out = torch.empty_like(x)
        rows = _rows(x, experts, shared_gate_up)
        kernels().experts_forward(_arguments(saved, rows, None), out=out.data_ptr())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved, grad_out = ctx.saved_tensors, grad_out.contiguous()
        x, shared_gate_up, experts = saved[0], saved[4], saved[7]
        is_wanted = [True, *ctx.needs_input_grad[1:3], True, *ctx.needs_input_grad[4:6], True]
        pairs = zip(saved, is_wanted, strict=False)
        empty: list[Any] = [torch.empty_like(t) if t is not None and wanted else None for t, wanted in pairs]
        grads = _Gradients(*empty)
        rows = _rows(x, experts, shared_gate_up)
        kernels().experts_backward(
            _arguments(saved, rows, grads),
            grad_out=grad_out.data_ptr(),
            grad_x=grads.x.data_ptr(),
            grad_weights=grads.weights.data_ptr(),
            grad_gate_vector=_address(grads.gate_vector),
        )
        return (*grads, None)


def _rows(x_TD: Tensor, experts_TA: Tensor, shared_gate_up: Tensor | None) -> Tensor:
    """What the experts make of their rows, until it is summed by token."""
    return x_TD.new_empty(experts_TA.numel() + (0 if shared_gate_up is None else len(x_TD)), x_TD.shape[1])


def _arguments(saved: tuple[Any, ...], rows: Tensor, grads: _Gradients | None) -> Any:
    x, gate_up, down, weights, shared_gate_up, shared_down, gate_vector, experts, hidden, shared_hidden, scales = saved
    num_tokens, top_k = experts.shape
    check_memory(x, torch.float32, (num_tokens, down.shape[1]))
    check_memory(weights, torch.float32, (num_tokens, top_k))
    check_memory(experts, torch.int64)
    native = kernels()
    routed = native.TrainedExperts(
        num_experts=down.shape[0],
        width=down.shape[2],
        gate_up=gate_up.data_ptr(),
        down=down.data_ptr(),
        hidden=hidden.data_ptr(),
        grad_gate_up=_address(grads and grads.gate_up),
        grad_down=_address(grads and grads.down),
    )
    shared = native.TrainedExperts(
        num_experts=0 if shared_down is None else 1,
        width=0 if shared_down is None else shared_down.shape[1],
        gate_up=_address(shared_gate_up),
        down=_address(shared_down),
        hidden=_address(shared_hidden),
        grad_gate_up=_address(grads and grads.shared_gate_up),
        grad_down=_address(grads and grads.shared_down),
    )
    return native.ExpertsTraining(
        num_tokens=num_tokens,
        top_k=top_k,
        size=down.shape[1],
        x=x.data_ptr(),
        weights=weights.data_ptr(),
        experts=experts.data_ptr(),
        routed=routed,
        shared=shared,
        gate_vector=_address(gate_vector),
        shared_scales=_address(scales),
        rows=rows.data_ptr(),
        is_shared=_is_shared(),
    )


# ---- the head ----


def serves_cross_entropy_sum(hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, *, chunk_rows: int = 0) -> bool:
    return trains(hidden_RD, weight_YD)


def cross_entropy_sum(hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, *, chunk_rows: int = 0) -> Tensor:
    """See ops.cross_entropy_sum. Raises IndexError for an invalid label."""
    check_linear(hidden_RD, weight_YD)
    chunk_rows = chunk_rows or min(_MAX_CHUNK_ROWS, max(_MIN_CHUNK_ROWS, _CHUNK_LOGITS // len(weight_YD)))
    return _Head.apply(hidden_RD, weight_YD, labels_R, chunk_rows)


class _Head(torch.autograd.Function):
    """The gradients are computed together with the value."""

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, chunk_rows: int) -> Tensor:
        hidden_RD, weight_YD, labels_R = hidden_RD.contiguous(), weight_YD.contiguous(), labels_R.contiguous()
        check_memory(labels_R, torch.int64, (len(hidden_RD),))
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.grad_hidden = torch.empty_like(hidden_RD) if needs_hidden else None
        ctx.grad_weight = torch.empty_like(weight_YD) if needs_weight else None
        arguments = kernels().HeadTraining(
            num_rows=len(hidden_RD),
            size=hidden_RD.shape[1],
            num_labels=len(weight_YD),
            chunk_rows=chunk_rows,
            x=hidden_RD.data_ptr(),
            weight=weight_YD.data_ptr(),
            labels=labels_R.data_ptr(),
            grad_x=_address(ctx.grad_hidden),
            grad_weight=_address(ctx.grad_weight),
            is_shared=_is_shared(),
        )
        return torch.tensor(kernels().cross_entropy_sum(arguments), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_total for grad in (ctx.grad_hidden, ctx.grad_weight))
        return (*grads, None, None)
