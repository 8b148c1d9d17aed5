"""The token mixer of Gated DeltaNet by GPU kernels: in steps or in chunks. Legend: see qnext.ops.mixers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.caches import DeltaCache, PendingTokens
from qnext.ops.checks import check_delta
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaWeights
from qnext.ops.triton.counters import NUM_COUNTERS, counters
from qnext.ops.triton.delta_chunks import MAX_HEAD_DIM
from qnext.ops.triton.delta_prompts import chunked_delta_mixer, try_gated_delta_prompt
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.train_mixer import trained_delta_mixer, try_delta_mixer_gradient
from qnext.ops.triton.trust import is_trusted, numbers, take, train, wants_gradients

_MAX_STEP = 16  # tokens of a sequence; longer pieces go faster in chunks
_BLOCK_VALUES = 32  # columns of a state that one program holds in registers


def serves_gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> bool:
    """Whether kernels take the call: as a step of a few tokens on slots, or in chunks.

    A state in bf16 is rounded where the prompt's grid says; the step's kernel rounds after every token, so it takes
    single tokens and drafts of one. Chunks take states in fp32 and no drafts.
    """
    if max(weights.key_head_dim, weights.value_head_dim) > MAX_HEAD_DIM or weights.conv_weight_C1W.shape[2] == 1:
        return False
    if wants_gradients(qkvz_TX, ba_TY, *weights.tensors):
        is_plain = cache is None and train(qkvz_TX, ba_TY, *weights.tensors)
        return is_plain and is_trusted(try_delta_mixer_gradient, qkvz_TX.device)
    if not take(qkvz_TX, ba_TY, *weights.tensors):
        return False
    if cache is None or packing.max_length > _MAX_STEP:
        is_plain = cache is None or (cache.state.dtype == torch.float32 and cache.is_draft_N is None)
        return is_plain and is_trusted(try_gated_delta_prompt, qkvz_TX.device)
    is_state = cache.state.dtype == torch.float32 or (cache.state.dtype == torch.bfloat16 and packing.max_length == 1)
    return (
        is_state
        and packing.num_sequences * (weights.num_key_heads + 1) <= NUM_COUNTERS
        and cache.state.is_contiguous()
        and all(map(_is_plain, (cache.conv, *([] if cache.pending is None else cache.pending[:-1]))))
        and is_trusted(try_gated_delta_step, qkvz_TX.device)
    )


def gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> Tensor:
    """See ops.gated_delta_mixer. Everything is fp32 and the output is cast once; training in bf16 rounds operands of
    products.

    A GPU is not waited for: in a step, a sequence whose slot does not exist becomes NaN and touches no other memory.
    """
    if wants_gradients(qkvz_TX, ba_TY, *weights.tensors):
        check_delta(qkvz_TX, ba_TY, weights, packing)
        return trained_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing)
    if cache is None or packing.max_length > _MAX_STEP:
        return chunked_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing, cache=cache)
    check_delta(qkvz_TX, ba_TY, weights, packing)
    cache.check_pending()
    cache.check_drafts(packing)
    qkvz_TX, ba_TY = (x if x.stride(1) == 1 else x.contiguous() for x in (qkvz_TX, ba_TY))
    pending, is_draft_N = _space_of(cache), cache.is_fresh_N if cache.is_draft_N is None else cache.is_draft_N
    num_channels, _, width = weights.conv_weight_C1W.shape
    heads = (weights.num_key_heads, weights.num_heads, weights.key_head_dim, weights.value_head_dim)
    call = _Launch(
        projections=(qkvz_TX, ba_TY, *(x.contiguous() for x in weights.tensors)),
        sequences=(packing.cu_seqlens, cache.slots_N, cache.is_fresh_N, is_draft_N),
        strides=(qkvz_TX.stride(0), ba_TY.stride(0)),
        sizes=(*heads, num_channels, pending.conv.shape[1], cache.state.shape[0]),
        form={
            "WIDTH": width,
            "HAS_FRESH": cache.has_fresh,
            "HAS_PENDING": cache.pending is not None,
            "HAS_DRAFT": cache.is_draft_N is not None,
        },
    )
    return _step(call, cache, pending, weights.eps)


class _Launch(NamedTuple):
    """What a launch is given."""

    projections: tuple[Tensor, ...]
    sequences: tuple[Tensor, ...]
    strides: tuple[int, int]
    sizes: tuple[int, ...]
    form: dict[str, Any]


def _step(call: _Launch, cache: DeltaCache, pending: PendingTokens, eps: float) -> Tensor:
    """The normed and gated outputs [T, Z]. Everything that is carried on becomes that after the call."""
    from qnext.ops.triton.kernels.delta_step import delta_step_kernel

    num_sequences = len(cache.slots_N)
    num_key_heads, num_heads, key_dim, value_dim = call.sizes[:4]
    qkvz_TX, width, num_drafts = call.projections[0], cache.conv.shape[1], pending.conv.shape[1]
    o_TZ = torch.empty((len(qkvz_TX), num_heads * value_dim), dtype=torch.float32, device=qkvz_TX.device)
    out_TZ = torch.empty_like(o_TZ, dtype=qkvz_TX.dtype)
    block = min(_BLOCK_VALUES, next_power_of_2(value_dim))
    delta_step_kernel[(num_sequences, num_heads, -(-value_dim // block))](
        *call.projections,
        *call.sequences,
        cache.conv,
        cache.state,
        *pending,
        o_TZ,
        out_TZ,
        counters(qkvz_TX.device),
        *call.strides,
        *call.sizes,
        eps,
        **call.form,
        HAS_BF16_STATE=cache.state.dtype == torch.bfloat16,
        BLOCK_K=next_power_of_2(key_dim),
        BLOCK_V=block,
        BLOCKS=tuple(map(next_power_of_2, (num_heads // num_key_heads, value_dim, width, max(1, num_drafts)))),
        num_warps=4,
    )
    return out_TZ


def _space_of(cache: DeltaCache) -> PendingTokens:
    """The pending tokens; where there are none, memory that nothing reads or writes."""
    if cache.pending is not None:
        return cache.pending
    return PendingTokens(cache.conv[:, :0], cache.conv, cache.conv, cache.conv, cache.slots_N)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def try_gated_delta_step(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """A continued sequence, a fresh one and a draft, with accepted tokens before them."""
    packing = Packing([2, 1, 3], device=device)
    weights = DeltaWeights(
        numbers(112, 1, 4, seed=0, device=device, scale=0.5),
        numbers(4, seed=1, device=device),
        numbers(4, seed=2, device=device),
        numbers(12, seed=3, device=device),
        eps=1e-6,
        num_key_heads=2,
        key_head_dim=16,
    )
    pending = PendingTokens(
        numbers(5, 3, 112, seed=4, device=device),
        numbers(5, 3, 2, 16, seed=5, device=device, scale=0.25),
        numbers(5, 3, 4, 12, seed=6, device=device),
        numbers(5, 3, 4, seed=7, device=device).sigmoid(),
        torch.tensor([2, 0, 3, 0, 1], device=device),
    )
    conv, state = numbers(5, 3, 112, seed=8, device=device), numbers(5, 4, 16, 12, seed=9, device=device)
    slots_N, is_fresh_N = torch.tensor([2, 0, 4], device=device), torch.tensor([False, True, False], device=device)
    cache = DeltaCache(conv, state, slots_N, is_fresh_N, True, pending, is_fresh_N.roll(1))
    theirs = cache._replace(
        conv=conv.clone(), state=state.clone(), pending=PendingTokens(*(x.clone() for x in pending))
    )
    qkvz_TX, ba_TY = numbers(6, 160, seed=10, device=device), numbers(6, 8, seed=11, device=device)
    wanted = reference.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing, cache=theirs)
    yield gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing, cache=cache), wanted
    yield from zip((conv, state, *pending), (theirs.conv, theirs.state, *(theirs.pending or ())), strict=True)
