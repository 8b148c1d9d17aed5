"""The public ops that have more than one implementation: the first backend that serves a call computes it.

Legend: T tokens, D hidden or inputs, F outputs or expert width, E experts, Y vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.choice import kernel_for, run
from qnext.ops.hosted import HostedWeight
from qnext.ops.inference_forward import with_inference_forward
from qnext.ops.records import ExpertsLora, MadeByShared, Norm, NormedLinears, NormedRoute, Rope, Routing, SharedExpert
from qnext.ops.weights import Weight


@with_inference_forward
def embedding(token_ids_T: Tensor, weight_YD: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """[T, D]: the rows of the tokens, in `dtype` or in the dtype of the table."""
    return run("embedding", token_ids_T, weight_YD, dtype=dtype)


def rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> Rope:
    """cos and sin, each [T, R / 2] fp32, of the angles position * frequency, times `attention_factor`."""
    return run("rope_cos_sin", positions_T, frequencies, attention_factor=attention_factor)


@with_inference_forward
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape and dtype: a residual connection."""
    return run("add", a, b)


@with_inference_forward
def concat(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """[T, 2 * D]: two matrices of one shape side by side."""
    return run("concat", a_TD, b_TD)


def put_rows(rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> None:
    """table[index] = rows, in place. The indices are all different."""
    run("put_rows", rows_TD, index_T, table_ND)


def argmax(rows_RY: Tensor, out_R: Tensor) -> None:
    """The index of the highest number of each row, the lowest index of equal ones, into `out_R` int64."""
    run("argmax", rows_RY, out_R)


def are_finite(x: Tensor) -> bool:
    """Whether every number is finite, without a temporary as large as the tensor."""
    x = x.detach()
    return run("are_finite", x)


@with_inference_forward
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    return run("swiglu", gate, up)


@with_inference_forward
def linear(x_TD: Tensor, weight_FD: Tensor | Weight, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x.

    Native kernels round x as the weight requires: to bf16 for bf16, to int8 with a scale per group for integer codes.
    Each row of the result depends only on its own row of x, to the last bit.
    """
    return run("linear", x_TD, weight_FD, bias_F)


def add_linear(residual_TF: Tensor, x_TD: Tensor, weight_FD: Tensor | Weight) -> Tensor:
    """residual + x W^T: linear and add, which kernels may compute as one."""
    kernel = kernel_for("add_linear", residual_TF, x_TD, weight_FD)
    return add(residual_TF, linear(x_TD, weight_FD)) if kernel is None else kernel(residual_TF, x_TD, weight_FD)


def normed_linears(x_TD: Tensor, norm: Norm, weights: tuple[Tensor | Weight, ...]) -> NormedLinears:
    """norm(x), and norm(x) W^T of each matrix: rms_norm and linear, which kernels may compute as one."""
    kernel = kernel_for("normed_linears", x_TD, norm, weights)
    if kernel is not None:
        return kernel(x_TD, norm, weights)
    rows_TD = rms_norm(x_TD, norm.weight_D, eps=norm.eps, zero_centered=norm.zero_centered)
    return NormedLinears(rows_TD, tuple(linear(rows_TD, weight) for weight in weights))


def cross_entropy_sum(hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, *, chunk_rows: int = 0) -> Tensor:
    """The sum over rows of -log softmax(x W^T)[label], in fp32 at least. Rows with a negative label count nothing.

    The logits of `chunk_rows` rows exist at a time; for 0 the backend chooses. Both gradients are computed
    together with the value.
    """
    return run("cross_entropy_sum", hidden_RD, weight_YD, labels_R, chunk_rows=chunk_rows)


@with_inference_forward
def experts_swiglu(
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """[T, D]: sum over each token's experts of weight * down(silu(gate(x)) * up(x)), plus the shared expert's part.

    `gate_up_E2FD` holds the gate rows of each expert, then its up rows. Work is grouped by expert. Experts without a
    token cost nothing.
    """
    if isinstance(gate_up_E2FD, HostedWeight):
        gate_up_E2FD, down_EDF, routing = gate_up_E2FD.experts.bring(routing, x_TD)
    return run("experts_swiglu", x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared)


def add_experts(
    residual_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor | Weight,
    down_EDF: Tensor | Weight,
    *,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> Tensor:
    """residual + experts_swiglu(x): experts_swiglu and add, which kernels may compute as one."""
    if isinstance(gate_up_E2FD, HostedWeight):
        gate_up_E2FD, down_EDF, routing = gate_up_E2FD.experts.bring(routing, x_TD)
    weights = gate_up_E2FD, down_EDF
    kernel = kernel_for("add_experts", residual_TD, x_TD, *weights, routing=routing, shared=shared)
    if kernel is None:
        return add(residual_TD, experts_swiglu(x_TD, *weights, routing=routing, shared=shared))
    return kernel(residual_TD, x_TD, *weights, routing=routing, shared=shared)


@with_inference_forward
def combine_experts(
    rows_PD: Tensor, weights_TA: Tensor, places_TA: Tensor, shared: MadeByShared | None = None
) -> Tensor:
    """[T, D]: the last part of experts_swiglu, with its bits. Row `places_TA[t, a]` is what the a-th expert of token t
    made of it, with the weight one."""
    return run("combine_experts", rows_PD, weights_TA, places_TA, shared)


@with_inference_forward
def lora_experts_swiglu(
    x_TD: Tensor, gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight, lora: ExpertsLora, *, routing: Routing
) -> Tensor:
    """[T, D]: experts_swiglu of matrices W + scale B A, which are never computed.

    Gradients reach x, the routing weights and the factors, and not the weights, whose form may be any. Raises
    ValueError for factors that do not fit.
    """
    if isinstance(gate_up_E2FD, HostedWeight):
        gate_up_E2FD, down_EDF, routing = gate_up_E2FD.experts.bring(routing, keeps_numbers=True)
    return run("lora_experts_swiglu", x_TD, gate_up_E2FD, down_EDF, lora, routing=routing)


@with_inference_forward
def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> Routing:
    """Softmax over all experts in fp32, then the best `top_k`, renormalised to the sum one where `norm_topk_prob`.

    `load_E`, int64, grows by the number of tokens that each expert got. Two calls at the same time must not share one.
    `chosen_TA` replays a choice: the experts are these, and their weights those that the scores give them.
    """
    how: Any = {"top_k": top_k, "norm_topk_prob": norm_topk_prob, "load_E": load_E, "chosen_TA": chosen_TA}
    return run("route", logits_TE, **how)


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
    """norm(x), its logits and the experts that they choose: normed_linears and route, which kernels may compute as
    one."""
    how: Any = {"top_k": top_k, "norm_topk_prob": norm_topk_prob, "load_E": load_E, "chosen_TA": chosen_TA}
    kernel = kernel_for("normed_route", x_TD, norm, weight_ED, **how)
    if kernel is not None:
        return kernel(x_TD, norm, weight_ED, **how)
    rows_TD, (logits_TE,) = normed_linears(x_TD, norm, (weight_ED,))
    return NormedRoute(rows_TD, logits_TE, route(logits_TE, **how))


@with_inference_forward
def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times (1 + weight) where `zero_centered`, times weight otherwise.

    Computed in fp32 (fp64 for fp64 input) and cast once, at the end. Qwen3-Next uses the zero-centred form for every
    norm but the one inside Gated DeltaNet; Qwen3 uses the plain form throughout.
    """
    how: Any = {"eps": eps, "zero_centered": zero_centered}
    return run("rms_norm", x, weight_D, **how)
