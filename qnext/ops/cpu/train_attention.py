"""Gated attention between its projections with its gradient, each one native call. Legend: see qnext.ops.mixers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.cpu.kernels import kernels
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, Rope


class _AttentionSizes(NamedTuple):
    eps: float
    zero_centered: bool
    has_gate: bool
    scale: float


class _AttentionInputs(NamedTuple):
    q_TX: Tensor
    k_TY: Tensor
    v_TY: Tensor
    q_norm_K: Tensor
    k_norm_K: Tensor
    cos: Tensor
    sin: Tensor


def trained_attention_mixer(
    q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, weights: AttentionWeights, *, rope: Rope, packing: Packing
) -> Tensor:
    """[T, H * K] fp32: every sequence attends to itself. See ops.attention_mixer."""
    sizes = _AttentionSizes(weights.eps, weights.zero_centered, weights.has_gate, weights.scale)
    norms = weights.q_norm_weight_K, weights.k_norm_weight_K
    return _AttentionMixer.apply(q_TX, k_TY, v_TY, *norms, *rope, sizes, packing)


class _AttentionMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, sizes, packing = arguments
        inputs = _AttentionInputs(*(x.contiguous() for x in tensors))
        num_tokens, head_dim = inputs.q_TX.shape[0], inputs.q_norm_K.shape[0]
        num_heads = inputs.q_TX.shape[1] // (head_dim * (2 if sizes.has_gate else 1))
        reads_THK = inputs.q_TX.new_empty(num_tokens, num_heads, head_dim)
        log_sums_TH = inputs.q_TX.new_empty(num_tokens, num_heads)
        out_TZ = inputs.q_TX.new_empty(num_tokens, num_heads * head_dim)
        call = _attention_arguments(inputs, reads_THK, log_sums_TH, sizes, packing)
        kernels().attention_training_forward(call, out_TZ.data_ptr())
        ctx.save_for_backward(*inputs, reads_THK, log_sums_TH)
        ctx.sizes, ctx.packing = sizes, packing
        return out_TZ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TZ: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, reads_THK, log_sums_TH = ctx.saved_tensors
        inputs, packing = _AttentionInputs(*tensors), ctx.packing
        call = _attention_arguments(inputs, reads_THK, log_sums_TH, ctx.sizes, packing)
        grad_TZ = grad_TZ.contiguous()
        grads = [torch.empty_like(x) for x in inputs[:3]]
        head_dim = inputs.q_norm_K.shape[0]
        partial = grad_TZ.new_empty(packing.num_sequences * (inputs.k_TY.shape[1] // head_dim), 2, head_dim)
        addresses = [x.data_ptr() for x in (grad_TZ, *grads, partial)]
        kernels().attention_training_backward(call, *addresses)
        return *grads, *partial.sum(0), None, None, None, None


def _attention_arguments(
    inputs: _AttentionInputs, reads_THK: Tensor, log_sums_TH: Tensor, sizes: _AttentionSizes, packing: Packing
) -> Any:
    head_dim = inputs.q_norm_K.shape[0]
    return kernels().AttentionTraining(
        num_sequences=packing.num_sequences,
        num_heads=reads_THK.shape[1],
        num_kv_heads=inputs.k_TY.shape[1] // head_dim,
        head_dim=head_dim,
        half=inputs.cos.shape[1],
        has_gate=sizes.has_gate,
        zero_centered=sizes.zero_centered,
        eps=sizes.eps,
        scale=sizes.scale,
        starts=packing.cu_seqlens.data_ptr(),
        q=inputs.q_TX.data_ptr(),
        k=inputs.k_TY.data_ptr(),
        v=inputs.v_TY.data_ptr(),
        q_norm=inputs.q_norm_K.data_ptr(),
        k_norm=inputs.k_norm_K.data_ptr(),
        cos=inputs.cos.data_ptr(),
        sin=inputs.sin.data_ptr(),
        reads=reads_THK.data_ptr(),
        log_sums=log_sums_TH.data_ptr(),
    )
