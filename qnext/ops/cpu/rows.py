"""Native operations on rows without a matrix product.

Legend: T tokens, D hidden, E experts, A experts per token, Y vocabulary, R rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.checks import check_norm, check_put_rows, check_route, check_same_shape
from qnext.ops.cpu.kernels import check_memory, is_fp32, kernels, run_on, take, wants_gradients, widened
from qnext.ops.cpu.panels import KIND_OF_FLOAT
from qnext.ops.cpu.train_rows import trained_rms_norm
from qnext.ops.records import Rope, Routing

_LANES = 16
# The exponent's field, all ones: infinity, or no number.
_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def _are_whole_vectors(x: Tensor) -> bool:
    return x.shape[-1] % _LANES == 0


def serves_embedding(token_ids_T: Tensor, weight_YD: Tensor, *, dtype: torch.dtype | None = None) -> bool:
    """Whether the rows are fp32 and the table is fp32 or bf16."""
    return (
        (dtype or weight_YD.dtype) == torch.float32
        and run_on(weight_YD.device)
        and not (torch.is_grad_enabled() and weight_YD.requires_grad)
        and token_ids_T.dim() == 1
        and weight_YD.dtype in KIND_OF_FLOAT
        and _are_whole_vectors(weight_YD)
        and weight_YD.is_contiguous()
    )


def embedding(token_ids_T: Tensor, weight_YD: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """[T, D] fp32. Raises IndexError for an invalid token."""
    token_ids_T = token_ids_T.contiguous()
    check_memory(token_ids_T, torch.int64)
    check_memory(weight_YD, weight_YD.dtype)
    num_tokens, (num_entries, size) = token_ids_T.shape[0], weight_YD.shape
    out_TD = torch.empty((num_tokens, size), dtype=torch.float32)
    is_bf16 = weight_YD.dtype == torch.bfloat16
    table = kernels().EmbeddingTable(rows=weight_YD.data_ptr(), is_bf16=is_bf16, num_entries=num_entries, size=size)
    kernels().embed(table, token_ids_T.data_ptr(), num_tokens, out_TD.data_ptr())
    return out_TD


def serves_rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> bool:
    return run_on(positions_T.device)


def rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> Rope:
    """cos and sin [T, R / 2] fp32. See ops.rope_cos_sin."""
    positions_T, frequencies = positions_T.contiguous(), frequencies.contiguous()
    check_memory(positions_T, torch.int64)
    check_memory(frequencies, torch.float32)
    num_tokens, half = positions_T.shape[0], frequencies.shape[0]
    cos, sin = (torch.empty((num_tokens, half), dtype=torch.float32) for _ in range(2))
    out = kernels().RopeRows(num_rows=num_tokens, half=half, cos=cos.data_ptr(), sin=sin.data_ptr())
    kernels().rope(positions_T.data_ptr(), frequencies.data_ptr(), attention_factor, out)
    return Rope(cos, sin)


def serves_put_rows(rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> bool:
    return take(rows_TD, table_ND)


def put_rows(rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> None:
    """table[index] = rows, fp32. Raises IndexError for an invalid index."""
    check_put_rows(rows_TD, index_T, table_ND)
    check_memory(index_T, torch.int64)
    check_memory(table_ND, torch.float32)
    rows_TD = rows_TD.contiguous()
    num_rows, size = rows_TD.shape
    kernels().put_rows(rows_TD.data_ptr(), index_T.data_ptr(), num_rows, size, table_ND.data_ptr(), table_ND.shape[0])


def serves_argmax(rows_RY: Tensor, out_R: Tensor) -> bool:
    return take(rows_RY)


def argmax(rows_RY: Tensor, out_R: Tensor) -> None:
    """The index of the highest number of each fp32 row, the lowest index of equal ones, into `out_R` int64."""
    check_memory(out_R, torch.int64, rows_RY.shape[:1])
    rows_RY = rows_RY.contiguous()
    kernels().argmax(rows_RY.data_ptr(), rows_RY.shape[0], rows_RY.shape[1], out_R.data_ptr())


def serves_concat(a_TD: Tensor, b_TD: Tensor) -> bool:
    return take(a_TD, b_TD)


def concat(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """[T, 2 * D]: two matrices of one shape side by side."""
    check_same_shape(a_TD, b_TD)
    a_TD, b_TD = a_TD.contiguous(), b_TD.contiguous()
    num_rows, size = a_TD.shape
    out = torch.empty((num_rows, 2 * size), dtype=torch.float32)
    kernels().concat(a_TD.data_ptr(), b_TD.data_ptr(), num_rows, size, out.data_ptr())
    return out


def serves_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> bool:
    if wants_gradients(x, weight_D):
        return run_on(x.device) and is_fp32(x) and is_fp32(weight_D) and _are_whole_vectors(x)
    return take(x) and _are_whole_vectors(x)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm."""
    check_norm(x, weight_D)
    if wants_gradients(x, weight_D):
        return trained_rms_norm(x, weight_D, eps=eps, zero_centered=zero_centered)
    x, weight_D, size = x.contiguous(), widened(weight_D), x.shape[-1]
    out = torch.empty_like(x)
    norm = kernels().RmsNorm(weight=weight_D.data_ptr(), size=size, eps=eps, zero_centered=zero_centered)
    kernels().rms_norm(norm, x.data_ptr(), x.numel() // size, out.data_ptr())
    return out


def serves_add(a: Tensor, b: Tensor) -> bool:
    return take(a, b) and _are_whole_vectors(a)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape."""
    check_same_shape(a, b)
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    kernels().add(a.data_ptr(), b.data_ptr(), a.numel(), out.data_ptr())
    return out


def serves_swiglu(gate: Tensor, up: Tensor) -> bool:
    return take(gate, up) and _are_whole_vectors(gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    check_same_shape(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    kernels().swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr())
    return out


def serves_route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> bool:
    is_replay = chosen_TA is not None
    return take(logits_TE) or (
        wants_gradients(logits_TE) and is_fp32(logits_TE) and run_on(logits_TE.device) and not is_replay
    )


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> Routing:
    """See ops.route. A token whose own choice is the replayed one has the bits that it had then."""
    num_tokens, num_experts = logits_TE.shape
    check_route(logits_TE, top_k, load_E, chosen_TA)
    if load_E is not None:
        check_memory(load_E, torch.int64)
    if wants_gradients(logits_TE):
        assert chosen_TA is None, "ask whether it serves first"
        return Routing(*_Choice.apply(logits_TE, top_k, norm_topk_prob, load_E))
    logits_TE = logits_TE.contiguous()
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32)
    chosen = torch.empty((num_tokens, top_k), dtype=torch.int64)
    load = 0 if load_E is None or chosen_TA is not None else load_E.data_ptr()
    choice = kernels().RouterChoice(
        num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, renormalize=norm_topk_prob
    )
    kernels().route(choice, logits_TE.data_ptr(), weights.data_ptr(), chosen.data_ptr(), load)
    if chosen_TA is None:
        return Routing(weights, chosen)
    replayed = logits_TE.softmax(-1).gather(1, chosen_TA)
    if norm_topk_prob:
        replayed = replayed / replayed.sum(-1, keepdim=True)
    if load_E is not None:
        load_E += chosen_TA.flatten().bincount(minlength=num_experts)
    is_own_T1 = (chosen == chosen_TA).all(-1, keepdim=True)
    return Routing(torch.where(is_own_T1, weights, replayed), chosen_TA)


class _Choice(torch.autograd.Function):
    """The gradient of the weights: that of a softmax over the chosen scores, or over all where the sum is kept."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int, norm_topk_prob: bool, load_E: Tensor | None) -> Routing:
        routing = route(logits_TE, top_k=top_k, norm_topk_prob=norm_topk_prob, load_E=load_E)
        ctx.mark_non_differentiable(routing.experts_TA)
        ctx.norm_topk_prob = norm_topk_prob
        ctx.save_for_backward(logits_TE, *routing)
        return routing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TA: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TE, weights_TA, experts_TA = ctx.saved_tensors
        mean_T1 = torch.linalg.vecdot(grad_TA, weights_TA)[:, None]
        grad_weights_TA = weights_TA * grad_TA
        if ctx.norm_topk_prob:
            grad_TE = torch.zeros_like(logits_TE)
            grad_weights_TA -= weights_TA * mean_T1
        else:
            grad_TE = logits_TE.softmax(-1).mul_(-mean_T1)
        return grad_TE.scatter_add_(1, experts_TA, grad_weights_TA), None, None, None


def serves_are_finite(x: Tensor) -> bool:
    return run_on(x.device) and x.dtype in _EXPONENTS and x.is_contiguous()


def are_finite(x: Tensor) -> bool:
    """See ops.are_finite."""
    finite: bool = kernels().are_finite(x.data_ptr(), x.numel(), 8 * x.itemsize, _EXPONENTS[x.dtype])
    return finite
