"""The token mixer of Gated DeltaNet with its gradient by GPU kernels. Legend: see qnext.ops.mixers; C channels.

Forward reads the projections once, writes the inputs of the delta rule in fp32 once, and reads outputs and gates once:
PyTorch's own steps move each of these numbers about ten times. The gradient keeps the projections and parameters alone.
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
from qnext.ops.records import DeltaInputs, DeltaWeights
from qnext.ops.triton.delta_chunks import CHUNK_SIZE, run_chunks
from qnext.ops.triton.outside import OutsideRule, training_rule
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.train_delta import DeltaGradients, chunks_backward, has_wide_products
from qnext.ops.triton.train_rows import GateLayout, NormForm, NormGradients, normed, normed_backward
from qnext.ops.triton.trust import compared, num_processors, numbers

_BLOCK_TOKENS = 16


class MixerSizes(NamedTuple):
    """Of a layer."""

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    eps: float

    @staticmethod
    def of(weights: DeltaWeights) -> MixerSizes:
        heads = weights.num_key_heads, weights.num_heads
        return MixerSizes(*heads, weights.key_head_dim, weights.value_head_dim, weights.eps)

    @property
    def num_channels(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim

    @property
    def gates(self) -> GateLayout:
        """Where z lies."""
        repeats = self.num_heads // self.num_key_heads
        first = 2 * self.key_dim + repeats * self.value_dim
        return GateLayout(self.num_heads, repeats, first + repeats * self.value_dim, first)


class MixerRows(NamedTuple):
    """The tensors of a call, contiguous."""

    qkvz_TX: Tensor
    ba_TY: Tensor
    conv_C1W: Tensor
    A_log_H: Tensor
    dt_bias_H: Tensor
    norm_V: Tensor


def trained_delta_mixer(qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing) -> Tensor:
    """[T, H * V] in the dtype of the rows, from zeros at the start of every sequence. See ops.gated_delta_mixer."""
    return _TrainedDeltaMixer.apply(qkvz_TX, ba_TY, *weights.tensors, MixerSizes.of(weights), packing)


class _TrainedDeltaMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, sizes, packing = arguments
        rows = MixerRows(*(x.contiguous() for x in tensors))
        ctx.save_for_backward(*rows)
        ctx.sizes, ctx.packing = sizes, packing
        inputs, rule = prepared(rows, sizes, packing), _rule_of(rows.qkvz_TX)
        if rule is None:
            is_wide = has_wide_products(rows.qkvz_TX.dtype)
            (o_THV, _), _ = run_chunks(inputs, packing=packing, is_wide=is_wide)
        else:
            o_THV, _ = rule(inputs, packing=packing)
        form, gates = NormForm(sizes.eps, False), (rows.qkvz_TX, sizes.gates)
        return normed(o_THV, rows.norm_V, form, gates, rows.qkvz_TX.dtype).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TZ: Tensor) -> tuple[Tensor | None, ...]:
        rows, sizes, packing = MixerRows(*ctx.saved_tensors), ctx.sizes, ctx.packing
        inputs, rule = prepared(rows, sizes, packing), _rule_of(rows.qkvz_TX)
        grad_qkvz_TX = torch.empty_like(rows.qkvz_TX)
        grads = _empty_inputs(len(grad_TZ), sizes, grad_TZ.device)

        def of_norm(o_THV: Tensor) -> NormGradients:
            gates = (rows.qkvz_TX, sizes.gates, grad_qkvz_TX)
            return normed_backward(o_THV, rows.norm_V, NormForm(sizes.eps, False), grad_TZ, gates)

        if rule is None:
            is_wide = has_wide_products(rows.qkvz_TX.dtype)
            (o_THV, _), kept = run_chunks(inputs, packing=packing, keeps=True, is_wide=is_wide)
            grad_o_THV, grad_norm_V = of_norm(o_THV)
            wanted = DeltaGradients(grad_o_THV, None, grads.inputs)
            chunks_backward(inputs, kept, wanted, packing=packing, is_wide=is_wide)
        else:
            leaves = DeltaInputs(*(x.detach().requires_grad_() for x in inputs))
            with torch.enable_grad():
                o_THV, _ = rule(leaves, packing=packing)
            grad_o_THV, grad_norm_V = of_norm(o_THV.detach())
            for to, grad in zip(grads.inputs, torch.autograd.grad(o_THV, leaves, grad_o_THV), strict=True):
                to.copy_(grad)
        return *_prepared_backward(rows, sizes, packing, grads, grad_qkvz_TX), grad_norm_V, None, None


def _rule_of(rows: Tensor) -> OutsideRule | None:
    """The rule of another program where one serves rows of that kind."""
    return training_rule(rows.device) if rows.dtype == torch.bfloat16 else None


class _Mixed(NamedTuple):
    """Inputs of the delta rule, or their gradients; q, k and v lie side by side, all fp32."""

    mixed_TC: Tensor
    inputs: DeltaInputs


def _empty_inputs(num_tokens: int, sizes: MixerSizes, device: torch.device) -> _Mixed:
    mixed_TC = torch.empty((num_tokens, sizes.num_channels), dtype=torch.float32, device=device)
    key_width = sizes.num_key_heads * sizes.key_dim
    q_TX, k_TX, v_TX = mixed_TC.split([key_width, key_width, sizes.num_channels - 2 * key_width], dim=1)
    q_TJK, k_TJK = (x.unflatten(1, (-1, sizes.key_dim)) for x in (q_TX, k_TX))
    gates = (mixed_TC.new_empty(num_tokens, sizes.num_heads) for _ in range(2))
    return _Mixed(mixed_TC, DeltaInputs(q_TJK, k_TJK, v_TX.unflatten(1, (-1, sizes.value_dim)), *gates))


def _launch(sizes: MixerSizes, width: int) -> dict[str, Any]:
    block = next_power_of_2(max(sizes.key_dim, sizes.value_dim))
    return {"WIDTH": width, "BLOCK_T": _BLOCK_TOKENS, "BLOCK_C": block, "num_warps": 4}


def prepared(rows: MixerRows, sizes: MixerSizes, packing: Packing, left_NWC: Tensor | None = None) -> DeltaInputs:
    """Convolution, silu, L2 norm of q and k, and gates. `left_NWC` are the inputs before each sequence, or zeros."""
    from qnext.ops.triton.kernels.delta_prepare import delta_prepare_kernel

    num_tokens = len(rows.qkvz_TX)
    mixed_TC, inputs = _empty_inputs(num_tokens, sizes, rows.qkvz_TX.device)
    delta_prepare_kernel[(-(-num_tokens // _BLOCK_TOKENS), 2 * sizes.num_key_heads + sizes.num_heads)](
        *rows[:5],
        packing.offsets_T,
        packing.sequence_ids_T,
        mixed_TC if left_NWC is None else left_NWC.float().contiguous(),
        mixed_TC,
        inputs.g_TH,
        inputs.beta_TH,
        rows.qkvz_TX.stride(0),
        rows.ba_TY.stride(0),
        num_tokens,
        *sizes[:4],
        sizes.num_channels,
        HAS_LEFT=left_NWC is not None,
        **_launch(sizes, rows.conv_C1W.shape[2]),
    )
    return inputs


def _prepared_backward(
    rows: MixerRows, sizes: MixerSizes, packing: Packing, grads: _Mixed, grad_qkvz_TX: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of both projections and of the parameters of convolution and gates; q, k and v are filled in."""
    from qnext.ops.triton.kernels.delta_prepare import delta_prepare_backward_kernel

    num_tokens, width = len(rows.qkvz_TX), rows.conv_C1W.shape[2]
    num_heads = 2 * sizes.num_key_heads + sizes.num_heads
    num_tiles = -(-num_tokens // _BLOCK_TOKENS)
    num_parts = min(num_tiles, max(1, 8 * num_processors(grad_qkvz_TX.device) // num_heads))
    tokens_each = -(-num_tiles // num_parts) * _BLOCK_TOKENS
    num_parts = -(-num_tokens // tokens_each)
    grad_ba_TY = torch.empty_like(rows.ba_TY)
    taps = grads.mixed_TC.new_empty(num_parts, *rows.conv_C1W.shape)
    gates = grads.mixed_TC.new_empty(num_parts, 2, sizes.num_heads)
    delta_prepare_backward_kernel[(num_parts, num_heads)](
        *rows[:5],
        packing.offsets_T,
        packing.lengths_N[packing.sequence_ids_T],
        grads.mixed_TC,
        grads.inputs.g_TH,
        grads.inputs.beta_TH,
        grad_qkvz_TX,
        grad_ba_TY,
        taps,
        gates,
        rows.qkvz_TX.stride(0),
        rows.ba_TY.stride(0),
        num_tokens,
        tokens_each,
        *sizes[:4],
        sizes.num_channels,
        **_launch(sizes, width),
        BLOCK_W=next_power_of_2(width),
    )
    sums = (taps.sum(0), *gates.sum(0))
    return grad_qkvz_TX, grad_ba_TY, *(x.to(p.dtype) for x, p in zip(sums, rows[2:5], strict=True))


def try_delta_mixer_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Two sequences, one shorter than the convolution; values of two heads read the keys of one."""
    packing = Packing([2, CHUNK_SIZE + 3], device=device)
    rows = (
        numbers(packing.num_tokens, 144, seed=0, device=device),
        numbers(packing.num_tokens, 4, seed=1, device=device),
        numbers(88, 1, 4, seed=2, device=device, scale=0.5),
        *(numbers(2, seed=seed, device=device, scale=0.5) for seed in (3, 4)),
        numbers(28, seed=5, device=device),
    )

    def of(mixer: Any, qkvz_TX: Tensor, ba_TY: Tensor, *tensors: Tensor) -> Tensor:
        conv_C1W, A_log_H, dt_bias_H, norm_V = tensors
        weights = DeltaWeights(conv_C1W, A_log_H, dt_bias_H, norm_V, eps=1e-6, num_key_heads=1, key_head_dim=16)
        out_TZ: Tensor = mixer(qkvz_TX, ba_TY, weights, packing=packing)
        return out_TZ

    yield from compared(partial(of, trained_delta_mixer), partial(of, reference.gated_delta_mixer), *rows)
