"""The token mixer of Gated DeltaNet with its gradient, each one native call. Legend: see qnext.ops.mixers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.cpu.kernels import kernels
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaWeights


class _DeltaKept(NamedTuple):
    """What the gradient reads beside the inputs: states between chunks, what each token writes and reads, its gates."""

    states: Tensor
    writes_THV: Tensor
    reads_THV: Tensor
    gates_TH2: Tensor


def trained_delta_mixer(qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing) -> Tensor:
    """[T, H * V] fp32, from zeros at the start of every sequence. See ops.gated_delta_mixer."""
    sizes = _DeltaSizes(weights.num_key_heads, weights.key_head_dim, weights.value_head_dim, weights.eps)
    return _DeltaMixer.apply(qkvz_TX.contiguous(), ba_TY.contiguous(), *weights.tensors, sizes, packing)


class _DeltaSizes(NamedTuple):
    num_key_heads: int
    key_dim: int
    value_dim: int
    eps: float


class _DeltaMixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkvz_TX: Tensor,
        ba_TY: Tensor,
        conv_C1W: Tensor,
        A_log_H: Tensor,
        dt_bias_H: Tensor,
        norm_V: Tensor,
        sizes: _DeltaSizes,
        packing: Packing,
    ) -> Tensor:
        num_heads, chunk = A_log_H.shape[0], kernels().delta_training_chunk()
        num_chunks = sum(-(-length // chunk) for length in packing.lengths)
        rows = (qkvz_TX.shape[0], num_heads, sizes.value_dim)
        kept = _DeltaKept(
            qkvz_TX.new_empty(num_chunks, num_heads, sizes.key_dim, sizes.value_dim),
            qkvz_TX.new_empty(rows),
            qkvz_TX.new_empty(rows),
            qkvz_TX.new_empty(*rows[:2], 2),
        )
        inputs = tuple(x.contiguous() for x in (qkvz_TX, ba_TY, conv_C1W, A_log_H, dt_bias_H, norm_V))
        out_TZ = qkvz_TX.new_empty(rows[0], rows[1] * rows[2])
        kernels().delta_training_forward(_arguments(inputs, kept, sizes, packing), out_TZ.data_ptr())
        ctx.save_for_backward(*inputs, *kept)
        ctx.sizes, ctx.packing = sizes, packing
        return out_TZ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TZ: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states, writes, reads, gates = ctx.saved_tensors
        sizes, packing = ctx.sizes, ctx.packing
        arguments = _arguments(tuple(inputs), _DeltaKept(states, writes, reads, gates), sizes, packing)
        grad_TZ = grad_TZ.contiguous()
        grad_qkvz, grad_ba = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
        partial = grad_TZ.new_empty(packing.num_sequences, sizes.num_key_heads, arguments.partial_size)
        kernels().delta_training_backward(
            arguments, grad_TZ.data_ptr(), grad_qkvz.data_ptr(), grad_ba.data_ptr(), partial.data_ptr()
        )
        return grad_qkvz, grad_ba, *_of_parameters(partial.sum(0), tuple(inputs), sizes), None, None


def _arguments(inputs: tuple[Tensor, ...], kept: _DeltaKept, sizes: _DeltaSizes, packing: Packing) -> Any:
    qkvz_TX, ba_TY, conv_C1W, A_log_H, dt_bias_H, norm_V = inputs
    return kernels().DeltaTraining(
        num_sequences=packing.num_sequences,
        num_key_heads=sizes.num_key_heads,
        repeats=A_log_H.shape[0] // sizes.num_key_heads,
        key_dim=sizes.key_dim,
        value_dim=sizes.value_dim,
        conv_width=conv_C1W.shape[2],
        eps=sizes.eps,
        starts=packing.cu_seqlens.data_ptr(),
        qkvz=qkvz_TX.data_ptr(),
        ba=ba_TY.data_ptr(),
        conv=conv_C1W.data_ptr(),
        A_log=A_log_H.data_ptr(),
        dt_bias=dt_bias_H.data_ptr(),
        norm=norm_V.data_ptr(),
        states=kept.states.data_ptr(),
        writes=kept.writes_THV.data_ptr(),
        reads=kept.reads_THV.data_ptr(),
        gates=kept.gates_TH2.data_ptr(),
    )


def _of_parameters(partial: Tensor, inputs: tuple[Tensor, ...], sizes: _DeltaSizes) -> tuple[Tensor, ...]:
    """Gradients of conv, A_log, dt_bias and norm from one row per key head, each with its own channels."""
    conv_C1W, A_log_H = inputs[2], inputs[3]
    width, repeats = conv_C1W.shape[2], A_log_H.shape[0] // sizes.num_key_heads
    columns = 2 * sizes.key_dim + repeats * sizes.value_dim
    taps, norm, A_log, dt_bias = partial.split([width * columns, sizes.value_dim, repeats, repeats], dim=-1)
    parts = taps.unflatten(1, (width, columns)).split([sizes.key_dim, sizes.key_dim, repeats * sizes.value_dim], dim=-1)
    conv = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    return conv[:, None], A_log.flatten(), dt_bias.flatten(), norm.sum(0)
