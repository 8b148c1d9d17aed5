"""The gated delta rule with its gradient by GPU kernels. Legend: see qnext.ops.torch.delta; B chunks.

The backward pass computes states and writes again: it keeps the inputs alone, and no state of 64 KB a head and chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qnext.ops.backends import is_interpreted
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaOutput
from qnext.ops.reference.delta import gated_delta_rule as definition
from qnext.ops.torch.norm import l2_norm
from qnext.ops.triton.delta_chunks import (
    CHUNK_SIZE,
    MAX_HEAD_DIM,
    KeptChunks,
    chunk_blocks,
    chunked_delta_rule,
    plain_inputs,
    run_chunks,
    try_gated_delta_chunks,
)
from qnext.ops.triton.trust import compared, is_trusted, numbers, take, train, wants_gradients

_BLOCK_INPUT_VALUES = 16  # values of a head that a program of a whole chunk holds at a time


def serves_gated_delta_rule(inputs: DeltaInputs, *, packing: Packing, initial_state_NHKV: Tensor | None = None) -> bool:
    """Whether kernels take heads of these sizes, in fp32."""
    tensors = (*inputs, *(() if initial_state_NHKV is None else (initial_state_NHKV,)))
    if max(inputs.k_TJK.shape[2], inputs.v_THV.shape[2]) > MAX_HEAD_DIM:
        return False
    if wants_gradients(*tensors):
        return train(*tensors) and is_trusted(try_gated_delta_gradient, inputs.v_THV.device)
    is_prompt = packing.max_length > 1
    return is_prompt and take(inputs.v_THV) and is_trusted(try_gated_delta_chunks, inputs.v_THV.device)


def gated_delta_rule(inputs: DeltaInputs, *, packing: Packing, initial_state_NHKV: Tensor | None = None) -> DeltaOutput:
    """See ops.gated_delta_rule. Everything is fp32; the output is cast to the dtype of v."""
    if wants_gradients(*inputs, initial_state_NHKV):
        o_THV, state_NHKV = _DeltaRule.apply(*inputs, initial_state_NHKV, packing)
    else:
        o_THV, state_NHKV = chunked_delta_rule(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV)
    return DeltaOutput(o_THV.to(inputs.v_THV.dtype), state_NHKV)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, state_NHKV, packing = arguments
        ctx.save_for_backward(*tensors, state_NHKV)
        ctx.packing, ctx.is_wide = packing, has_wide_products(tensors[2].dtype)
        how: dict[str, Any] = {"initial_state_NHKV": state_NHKV, "is_wide": ctx.is_wide}
        return run_chunks(DeltaInputs(*tensors), packing=packing, **how)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THV: Tensor, grad_NHKV: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, state_NHKV = ctx.saved_tensors
        inputs = plain_inputs(DeltaInputs(*tensors))
        how: dict[str, Any] = {"packing": ctx.packing, "is_wide": ctx.is_wide}
        kept = run_chunks(inputs, initial_state_NHKV=state_NHKV, keeps=True, **how)[1]
        grads = DeltaInputs(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs))
        grad_state = chunks_backward(inputs, kept, DeltaGradients(grad_THV, grad_NHKV, grads), **how)
        cast = (grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True))
        return *cast, None if state_NHKV is None else grad_state.to(state_NHKV.dtype), None


class DeltaGradients(NamedTuple):
    """Gradients of the results, and where those of the inputs are written, in fp32."""

    o_THV: Tensor
    state_NHKV: Tensor | None
    inputs: DeltaInputs


def has_wide_products(dtype: torch.dtype) -> bool:
    """Whether training on rows of that dtype multiplies in fp32: not in bf16, which the interpreter cannot multiply."""
    return dtype != torch.bfloat16 or is_interpreted()


def chunks_backward(
    inputs: DeltaInputs, kept: KeptChunks, grads: DeltaGradients, *, packing: Packing, is_wide: bool
) -> Tensor:
    """The gradient of the initial states [N, H, K, V]. Those of the inputs, which are plain, are written."""
    from qnext.ops.triton.kernels.delta_chunks_backward import (
        delta_inputs_backward_kernel,
        delta_states_backward_kernel,
    )

    q_TJK, k_TJK, v_THV, g_TH, beta_TH = inputs
    num_key_heads, key_dim = k_TJK.shape[1:]
    num_heads, value_dim = v_THV.shape[1:]
    sizes = (num_key_heads, num_heads, key_dim, value_dim)
    blocks = chunk_blocks(key_dim, value_dim, is_wide=is_wide)
    chunks = packing.chunks(CHUNK_SIZE)
    grad_o_THV = grads.o_THV.float().contiguous()
    exits_BHKV, right_THV = torch.empty_like(kept.states_BHKV), torch.empty_like(kept.u_THV)
    grad_state_NHKV = right_THV.new_empty(packing.num_sequences, num_heads, key_dim, value_dim)
    delta_states_backward_kernel[(packing.num_sequences, num_heads, blocks.num_blocks(value_dim))](
        q_TJK,
        k_TJK,
        g_TH,
        beta_TH,
        packing.cu_seqlens,
        chunks.of_sequences_N1,
        grad_o_THV,
        grad_o_THV if grads.state_NHKV is None else grads.state_NHKV.float().contiguous(),
        exits_BHKV,
        right_THV,
        grad_state_NHKV,
        q_TJK.stride(0),
        k_TJK.stride(0),
        *sizes,
        HAS_LAST=grads.state_NHKV is not None,
        **blocks._asdict(),
    )
    delta_inputs_backward_kernel[(len(chunks.tokens_B), num_key_heads)](
        *inputs,
        chunks.tokens_B,
        chunks.lengths_B,
        kept.states_BHKV,
        exits_BHKV,
        kept.u_THV,
        right_THV,
        grad_o_THV,
        *grads.inputs,
        *(x.stride(0) for x in (q_TJK, k_TJK, v_THV, *grads.inputs[:3])),
        *sizes,
        **blocks._replace(BLOCK_V=_BLOCK_INPUT_VALUES)._asdict(),
    )
    return grad_state_NHKV


def try_gated_delta_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Two sequences from states: outputs, last states and the gradients of all inputs."""
    packing = Packing([3, CHUNK_SIZE + 4], device=device)
    num_tokens = packing.num_tokens
    inputs = (
        l2_norm(numbers(num_tokens, 1, 24, seed=0, device=device)),
        l2_norm(numbers(num_tokens, 1, 24, seed=1, device=device)),
        numbers(num_tokens, 2, 20, seed=2, device=device),
        -numbers(num_tokens, 2, seed=3, device=device, scale=0.5).abs(),
        numbers(num_tokens, 2, seed=4, device=device).sigmoid(),
        numbers(2, 2, 24, 20, seed=5, device=device),
    )

    def of(rule: Callable[..., DeltaOutput]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *x: tuple(rule(DeltaInputs(*x[:5]), packing=packing, initial_state_NHKV=x[5]))

    yield from compared(of(gated_delta_rule), of(definition), *inputs)
