"""The public ops that have more than one implementation: each asks qnext.ops.backend who runs.

Legend: T tokens, D hidden or inputs, F outputs or expert width, E experts, Y vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops.backend import is_native, native, runs_native, wide
from qnext.ops.cpu import linear as cpu
from qnext.ops.cpu import rows
from qnext.ops.cpu.panels import KIND_OF_FLOAT
from qnext.ops.reference import linear as reference_linear
from qnext.ops.reference import moe as reference_moe
from qnext.ops.reference import norm as reference_norm
from qnext.ops.reference import rope as reference_rope
from qnext.ops.reference.moe import Routing, SharedExpert
from qnext.ops.weights import Weight


def _grad_source(weight: Weight) -> Tensor | None:
    return weight if isinstance(weight, Tensor) else None


def embedding(token_ids_T: Tensor, weight_YD: Tensor) -> Tensor:
    """[T, D]: the rows of the tokens. Native inference computes in fp32 from here on, whatever the weights are."""
    wants_grad = torch.is_grad_enabled() and weight_YD.requires_grad
    if not is_native(weight_YD.device) or wants_grad or token_ids_T.dim() != 1:
        return F.embedding(token_ids_T, weight_YD)
    if weight_YD.dtype in KIND_OF_FLOAT and rows.fits_rows(weight_YD) and weight_YD.is_contiguous():
        return rows.embed(native(), token_ids_T, weight_YD)
    rows_TD = F.embedding(token_ids_T, weight_YD)
    return rows_TD.to(torch.float32) if rows_TD.dtype == torch.bfloat16 else rows_TD


def rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, R / 2] fp32, of the angles position * frequency, times `attention_factor`."""
    if is_native(positions_T.device):
        return rows.rope_cos_sin(native(), positions_T, frequencies, attention_factor=attention_factor)
    return reference_rope.rope_cos_sin(positions_T, frequencies, attention_factor=attention_factor)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape and dtype: a residual connection."""
    if runs_native(a, b) and rows.fits_rows(a):
        return rows.add(native(), a, b)
    return a + b


def concat(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """[T, 2 * D]: two matrices of one shape side by side."""
    if runs_native(a_TD, b_TD):
        return rows.concat(native(), a_TD, b_TD)
    return torch.cat([a_TD, b_TD], dim=-1)


def put_rows(rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> None:
    """table[index] = rows, in place; the indices differ."""
    if runs_native(rows_TD, table_ND):
        rows.put_rows(native(), rows_TD, index_T, table_ND)
    else:
        table_ND.index_copy_(0, index_T, rows_TD.to(table_ND.dtype))


def argmax(rows_RY: Tensor, out_R: Tensor) -> None:
    """Where each row is highest, the lowest place of equal ones, into `out_R` int64."""
    if runs_native(rows_RY):
        rows.argmax(native(), rows_RY, out_R)
    else:
        torch.argmax(rows_RY, dim=-1, out=out_R)


def are_finite(x: Tensor) -> bool:
    """Whether every number is finite, without a temporary as large as the tensor."""
    x = x.detach()
    if is_native(x.device) and rows.fits_finite(x):
        return rows.are_finite(native(), x)
    if not x.is_floating_point() or x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    if runs_native(gate, up) and rows.fits_rows(gate):
        return rows.swiglu(native(), gate, up)
    return F.silu(gate) * up


def linear(x_TD: Tensor, weight_FD: Weight, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x. `weight_FD` is a tensor or quantised.

    Native kernels round x as the weight asks: to bf16 for bf16, to int8 with a scale per group for integer codes. Each
    row of the result depends on its own row of x alone, to the last bit.
    """
    if runs_native(x_TD, _grad_source(weight_FD), bias_F) and x_TD.dim() == 2 and cpu.fits_weight(weight_FD):
        out_TF = cpu.linear(native(), x_TD, weight_FD)
        return out_TF if bias_F is None else out_TF.add_(wide(bias_F))
    return reference_linear.linear(x_TD, weight_FD, bias_F)


def experts_swiglu(
    x_TD: Tensor, gate_up_E2FD: Weight, down_EDF: Weight, *, routing: Routing, shared: SharedExpert | None = None
) -> Tensor:
    """[T, D]: sum over each token's experts of weight * down(silu(gate(x)) * up(x)), plus the shared expert's part.

    `gate_up_E2FD` holds the gate rows of each expert, then its up rows. Work is grouped by expert: experts without a
    token cost nothing.
    """
    shared_weights = () if shared is None else shared.weights
    sources = (_grad_source(weight) for weight in (gate_up_E2FD, down_EDF, *shared_weights))
    if (
        runs_native(x_TD, routing.weights_TA, *sources)
        and cpu.fits_experts(gate_up_E2FD, down_EDF)
        and all(cpu.fits_weight(weight) for weight in shared_weights)
    ):
        fused = None
        if shared is not None:
            vector = None if shared.gate_1D is None else wide(shared.gate_1D)
            fused = (*shared.weights, vector)
        weights_TA, experts_TA = routing
        return cpu.experts(native(), x_TD, gate_up_E2FD, down_EDF, weights_TA, experts_TA, fused)
    return reference_moe.experts_swiglu(x_TD, gate_up_E2FD, down_EDF, routing=routing, shared=shared)


def route(logits_TE: Tensor, *, top_k: int, norm_topk_prob: bool, load_E: Tensor | None = None) -> Routing:
    """Softmax over all experts in fp32, the best `top_k`, renormalised to sum one where `norm_topk_prob`.

    `load_E`, int64, grows by the number of tokens that each expert got. Two calls at a time must not share one.
    """
    if runs_native(logits_TE):
        return Routing(*rows.route(native(), logits_TE, top_k=top_k, norm_topk_prob=norm_topk_prob, load_E=load_E))
    return reference_moe.route(logits_TE, top_k=top_k, norm_topk_prob=norm_topk_prob, load_E=load_E)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times (1 + weight) where `zero_centered`, times weight otherwise.

    Computed in fp32 (fp64 for fp64 input) and cast once, at the end. Qwen3-Next uses the zero-centred form for every
    norm but the one inside Gated DeltaNet; Qwen3 uses the plain form throughout.
    """
    if runs_native(x, weight_D) and rows.fits_rows(x):
        return rows.rms_norm(native(), x, wide(weight_D), eps=eps, zero_centered=zero_centered)
    return reference_norm.rms_norm(x, weight_D, eps=eps, zero_centered=zero_centered)
