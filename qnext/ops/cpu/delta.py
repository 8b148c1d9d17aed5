"""The token mixer of Gated DeltaNet by a native kernel. Legend: see qnext.ops.mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops.caches import DeltaCache, PendingTokens
from qnext.ops.checks import check_delta
from qnext.ops.cpu.kernels import check_memory, is_fp32, kernels, run_on, take, wants_gradients, widened
from qnext.ops.cpu.train_delta import trained_delta_mixer
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaWeights

_LANES = 16
_STATE_DTYPES = (torch.float32, torch.bfloat16)


def serves_gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> bool:
    """Whether the kernel can run these sizes and write these slots."""
    if wants_gradients(qkvz_TX, ba_TY, *weights.tensors):
        is_plain = cache is None and all(map(is_fp32, (qkvz_TX, ba_TY, *weights.tensors)))
        return is_plain and run_on(qkvz_TX.device) and fits_gated_delta_mixer(weights)
    return (
        take(qkvz_TX)
        and fits_gated_delta_mixer(weights)
        and (cache is None or (_is_plain(cache.conv) and _is_state(cache.state)))
        and (cache is None or cache.pending is None or _fits_pending(cache.pending))
    )


def fits_gated_delta_mixer(weights: DeltaWeights) -> bool:
    """Whether the kernel, which is there, takes heads and convolutions of that size."""
    return (
        weights.key_head_dim % _LANES == 0
        and weights.value_head_dim % _LANES == 0
        and 1 <= weights.conv_weight_C1W.shape[2] <= kernels().MAX_CONV_WIDTH
    )


def serves_apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> bool:
    """Whether the kernel can write these states."""
    return (
        run_on(state.device)
        and state.shape[3] % _LANES == 0
        and _is_plain(conv)
        and _is_state(state)
        and _fits_pending(pending)
    )


def _fits_pending(pending: PendingTokens) -> bool:
    return fits_drafts(pending.num_drafts) and all(_is_plain(x) for x in pending[:-1])


def fits_drafts(num_draft_tokens: int) -> bool:
    """Whether the kernel, which is there, applies so many pending tokens of a sequence."""
    return bool(num_draft_tokens <= kernels().MAX_DRAFT_TOKENS)


def gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> Tensor:
    """[T, H * V] fp32. See ops.gated_delta_mixer.

    The bits do not depend on how the tokens of a sequence are cut into calls, on which of them were drafts, or on the
    sequences beside it; for bf16 states within the rules of DeltaCache. With gradients it serves calls without a cache,
    and only packed and separate sequences agree in every bit. Raises IndexError for an invalid slot,
    ValueError for a draft that is too long.
    """
    check_delta(qkvz_TX, ba_TY, weights, packing)
    if wants_gradients(qkvz_TX, ba_TY, *weights.tensors):
        return trained_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing)
    num_heads, key_head_dim, value_dim = weights.num_heads, weights.key_head_dim, weights.value_head_dim
    num_channels, _, width = weights.conv_weight_C1W.shape
    num_tokens, num_sequences = qkvz_TX.shape[0], packing.num_sequences
    if cache is None:
        cache = DeltaCache(
            conv=torch.empty((num_sequences, width - 1, num_channels), dtype=torch.float32),
            state=torch.empty((num_sequences, num_heads, key_head_dim, value_dim), dtype=torch.float32),
            slots_N=torch.arange(num_sequences),
            is_fresh_N=torch.ones(num_sequences, dtype=torch.bool),
        )
    _check_cache(cache, num_sequences, (width - 1, num_channels), (num_heads, key_head_dim, value_dim))
    qkvz_TX, ba_TY, conv_weight_C1W = _plain(qkvz_TX), _plain(ba_TY), _plain(widened(weights.conv_weight_C1W))
    A_log_H, dt_bias_H, norm_weight_V = map(widened, weights.tensors[1:])
    out_TZ = torch.empty((num_tokens, num_heads * value_dim), dtype=torch.float32)
    native = kernels()
    native.gated_delta_mixer(
        qkvz_TX.data_ptr(),
        ba_TY.data_ptr(),
        native.DeltaWeights(
            conv=conv_weight_C1W.data_ptr(),
            A_log=A_log_H.data_ptr(),
            dt_bias=dt_bias_H.data_ptr(),
            norm=norm_weight_V.data_ptr(),
            eps=weights.eps,
        ),
        native.DeltaSequences(
            num_sequences=num_sequences,
            num_slots=cache.state.shape[0],
            starts=packing.cu_seqlens.data_ptr(),
            slots=cache.slots_N.data_ptr(),
            is_fresh=cache.is_fresh_N.data_ptr() if cache.has_fresh else 0,
            is_draft=_address(cache.is_draft_N),
            context_lengths=_address(cache.context_lengths_N),
            prompt_lengths=_address(cache.prompt_lengths_N),
        ),
        _slots(cache.conv, cache.state, cache.pending),
        out_TZ.data_ptr(),
    )
    return out_TZ


def apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """See ops.apply_pending. Raises IndexError for an invalid slot or an invalid number of accepted tokens."""
    pending.check_sizes(conv, state)
    check_memory(slots_N, torch.int64, (slots_N.shape[0],))
    slots = _slots(conv, state, pending)
    kernels().apply_pending(slots, slots_N.data_ptr(), slots_N.shape[0], state.shape[0])


def _slots(conv: Tensor, state: Tensor, pending: PendingTokens | None) -> Any:
    """The memory of one layer as the kernels know it."""
    _, num_heads, key_dim, value_dim = state.shape
    num_key_heads = (conv.shape[2] - num_heads * value_dim) // (2 * key_dim)
    native = kernels()
    of_drafts = None
    if pending is not None:
        addresses = {name: tensor.data_ptr() for name, tensor in pending._asdict().items()}
        of_drafts = native.DeltaPending(num_drafts=pending.num_drafts, **addresses)
    return native.DeltaSlots(
        num_key_heads=num_key_heads,
        num_value_heads=num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        conv_width=conv.shape[1] + 1,
        conv=conv.data_ptr(),
        state=state.data_ptr(),
        has_bf16_state=state.dtype == torch.bfloat16,
        pending=of_drafts,
    )


def _address(numbers: Tensor | None) -> int:
    return 0 if numbers is None else numbers.data_ptr()


def _check_cache(
    cache: DeltaCache, num_sequences: int, conv_shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> None:
    conv, state = cache.conv, cache.state
    if conv.shape[1:] != conv_shape or state.shape[1:] != state_shape or conv.shape[0] != state.shape[0]:
        raise ValueError(
            f"slots of {tuple(conv.shape)} and {tuple(state.shape)} numbers, not of {conv_shape} and {state_shape}"
        )
    cache.check_pending()
    check_memory(cache.slots_N, torch.int64, (num_sequences,))
    check_memory(cache.is_fresh_N, torch.bool, (num_sequences,))
    if cache.is_draft_N is not None:
        check_memory(cache.is_draft_N, torch.bool, (num_sequences,))
    for lengths_N in (cache.context_lengths_N, cache.prompt_lengths_N):
        if lengths_N is not None:
            check_memory(lengths_N, torch.int64, (num_sequences,))
    if cache.pending is not None:
        check_memory(cache.pending.num_accepted, torch.int64, (state.shape[0],))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.is_cpu


def _is_state(tensor: Tensor) -> bool:
    return tensor.dtype in _STATE_DTYPES and tensor.is_contiguous() and tensor.is_cpu


def _plain(tensor: Tensor) -> Tensor:
    return tensor if _is_plain(tensor) else tensor.detach().to("cpu", torch.float32).contiguous()
