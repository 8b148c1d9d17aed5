"""Gated attention between its projections, with its gradient. Legend: see qnext.ops.mixers.

GPU kernels make what stands around the attention itself, which is PyTorch's: norms and rotations of q and k in one pass
each, 2 numbers moved for each of theirs where PyTorch's steps move about sixteen, and the output gate in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops import reference
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, Rope
from qnext.ops.torch.attention import attention
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.trust import compared, num_processors, numbers

_TILE = 2048  # numbers that a program holds of each tensor


class _HeadForm(NamedTuple):
    head_dim: int
    eps: float
    zero_centered: bool
    has_gate: bool  # behind the dims of each head


def trained_attention_mixer(
    q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, weights: AttentionWeights, *, rope: Rope, packing: Packing
) -> Tensor:
    """[T, H * K] in the dtype of the rows: every sequence attends to itself. See ops.attention_mixer."""
    head_dim = weights.head_dim
    form = _HeadForm(head_dim, weights.eps, weights.zero_centered, weights.has_gate)
    angles = Rope(*(x.float().contiguous() for x in rope))
    q_THK, gate_THK = _Heads.apply(q_TX, weights.q_norm_weight_K, angles, form)
    k_TGK, _ = _Heads.apply(k_TY, weights.k_norm_weight_K, angles, form._replace(has_gate=False))
    v_TGK = v_TY.unflatten(1, (-1, head_dim))
    out_THK = attention(q_THK, k_TGK, v_TGK, packing=packing, scale=weights.scale)
    return (out_THK if gate_THK is None else _OutputGate.apply(out_THK, gate_THK)).flatten(1)


class _Heads(torch.autograd.Function):
    """Normalised and rotated heads [T, H, K], and their gates as they lie in the rows, or None."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, norm_K: Tensor, rope: Rope, form: _HeadForm) -> tuple[Tensor, Tensor | None]:
        from qnext.ops.triton.kernels.attention_heads import heads_kernel

        rows_TX = x_TX if x_TX.stride(1) == 1 else x_TX.contiguous()
        ctx.save_for_backward(rows_TX, norm_K, *rope)
        ctx.form = form
        step = form.head_dim * (2 if form.has_gate else 1)
        num_tokens, num_heads = len(x_TX), x_TX.shape[1] // step
        out_THK = torch.empty((num_tokens, num_heads, form.head_dim), dtype=x_TX.dtype, device=x_TX.device)
        launch = _launch(form.head_dim)
        heads_kernel[(-(-num_tokens // launch["BLOCK_T"]), num_heads)](
            rows_TX,
            norm_K.contiguous(),
            *rope,
            out_THK,
            rows_TX.stride(0),
            step,
            num_tokens,
            num_heads,
            form.head_dim,
            rope.cos.shape[1],
            form.eps,
            ZERO_CENTERED=form.zero_centered,
            **launch,
        )
        gate_THK = x_TX.unflatten(1, (num_heads, step))[:, :, form.head_dim :] if form.has_gate else None
        return out_THK, gate_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THK: Tensor, grad_gate_THK: Tensor | None) -> tuple[Tensor | None, ...]:
        from qnext.ops.triton.kernels.attention_heads import heads_backward_kernel

        (rows_TX, norm_K, cos, sin), form = ctx.saved_tensors, ctx.form
        num_tokens, num_heads, _ = grad_THK.shape
        launch = _launch(form.head_dim)
        num_tiles = -(-num_tokens // launch["BLOCK_T"])
        num_parts = min(num_tiles, max(1, 8 * num_processors(rows_TX.device) // num_heads))
        tokens_each = -(-num_tiles // num_parts) * launch["BLOCK_T"]
        num_parts = -(-num_tokens // tokens_each)
        rows_TX, grad_THK = rows_TX.contiguous(), grad_THK.contiguous()
        grad_TX = torch.empty_like(rows_TX)
        sums = torch.empty((num_parts, num_heads, form.head_dim), dtype=torch.float32, device=rows_TX.device)
        heads_backward_kernel[(num_parts, num_heads)](
            rows_TX,
            norm_K.contiguous(),
            cos,
            sin,
            grad_THK,
            grad_THK if grad_gate_THK is None else grad_gate_THK.contiguous(),
            grad_TX,
            sums,
            rows_TX.stride(0),
            form.head_dim * (2 if form.has_gate else 1),
            num_tokens,
            tokens_each,
            num_heads,
            form.head_dim,
            cos.shape[1],
            form.eps,
            ZERO_CENTERED=form.zero_centered,
            HAS_GATE=form.has_gate,
            **launch,
        )
        return grad_TX, sums.sum((0, 1)).to(norm_K.dtype), None, None


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, gate_THK: Tensor) -> Tensor:
        x_THK = x_THK.contiguous()
        ctx.save_for_backward(x_THK, gate_THK)
        out_THK = torch.empty_like(x_THK)
        _gate(x_THK, gate_THK, x_THK, (out_THK, out_THK), is_backward=False)
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor, Tensor]:
        x_THK, gate_THK = ctx.saved_tensors
        grad_x_THK = torch.empty_like(x_THK)
        grad_gate_THK = torch.empty(x_THK.shape, dtype=gate_THK.dtype, device=x_THK.device)
        _gate(x_THK, gate_THK, grad_THK.contiguous(), (grad_x_THK, grad_gate_THK), is_backward=True)
        return grad_x_THK, grad_gate_THK


def _gate(x_THK: Tensor, gate_THK: Tensor, grad_THK: Tensor, out: tuple[Tensor, Tensor], *, is_backward: bool) -> None:
    from qnext.ops.triton.kernels.attention_heads import output_gate_kernel

    num_tokens, num_heads, head_dim = x_THK.shape
    launch = _launch(head_dim)
    rows = launch.pop("BLOCK_T")
    output_gate_kernel[(-(-num_tokens * num_heads // rows),)](
        x_THK,
        gate_THK,
        grad_THK,
        *out,
        gate_THK.stride(0),
        gate_THK.stride(1),
        num_tokens * num_heads,
        num_heads,
        head_dim,
        IS_BACKWARD=is_backward,
        ROWS=rows,
        **launch,
    )


def _launch(head_dim: int) -> dict[str, Any]:
    block = next_power_of_2(head_dim)
    return {"BLOCK_T": max(1, _TILE // block), "BLOCK_K": block, "num_warps": 4}


def try_attention_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Two sequences, two query heads of a key head, of which a third is rotated."""
    packing = Packing([3, 6], device=device)
    rope = Rope(numbers(9, 4, seed=0, device=device), numbers(9, 4, seed=1, device=device))
    rows = [numbers(9, width, seed=width, device=device) for width in (96, 24, 25)]
    norms = [numbers(24, seed=seed, device=device, scale=0.3) for seed in (2, 3)]

    def of(mixer: Any, q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, q_norm_K: Tensor, k_norm_K: Tensor) -> Tensor:
        weights = AttentionWeights(q_norm_K, k_norm_K, eps=1e-6, zero_centered=True, has_gate=True, scale=0.2)
        out_TX: Tensor = mixer(q_TX, k_TY, v_TY[:, 1:], weights, rope=rope, packing=packing)
        return out_TX

    yield from compared(partial(of, trained_attention_mixer), partial(of, reference.attention_mixer), *rows, *norms)
