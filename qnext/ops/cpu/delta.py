"""The token mixer of Gated DeltaNet by a native kernel. Legend: see qnext.ops.reference.delta_mixer."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qnext.ops.backend import wide
from qnext.ops.packing import Packing
from qnext.ops.reference.delta_mixer import DeltaCache
from qnext.ops.reference.delta_pending import PendingTokens

_LANES = 16
_STATE_DTYPES = (torch.float32, torch.bfloat16)


def fits_mixer(
    native: ModuleType, conv_weight_C1W: Tensor, norm_weight_V: Tensor, key_head_dim: int, cache: DeltaCache | None
) -> bool:
    """Whether the kernel can run these sizes and write these slots."""
    return (
        key_head_dim % _LANES == 0
        and norm_weight_V.shape[0] % _LANES == 0
        and 1 <= conv_weight_C1W.shape[2] <= native.MAX_CONV_WIDTH
        and (cache is None or (_is_plain(cache.conv) and _is_state(cache.state)))
        and (cache is None or cache.pending is None or _fits_pending(native, cache.pending))
    )


def fits_slots(native: ModuleType, conv: Tensor, state: Tensor, pending: PendingTokens) -> bool:
    """Whether the kernel can apply these pending tokens to these states."""
    return (
        state.shape[3] % _LANES == 0 and _is_plain(conv) and _is_state(state) and _fits_pending(native, pending)
    )  # fmt: skip


def _fits_pending(native: ModuleType, pending: PendingTokens) -> bool:
    return pending.num_drafts <= native.MAX_DRAFT_TOKENS and all(_is_plain(x) for x in pending[:-1])


def gated_delta_mixer(
    native: ModuleType,
    qkvz_TX: Tensor,
    ba_TY: Tensor,
    *,
    conv_weight_C1W: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    num_key_heads: int,
    key_head_dim: int,
    packing: Packing,
    cache: DeltaCache | None,
) -> Tensor:
    """[T, H * V] fp32. See ops.gated_delta_mixer.

    The same bits however the tokens of a sequence are cut into calls, whichever of them were drafts and whatever
    sequences run beside it; for states in bf16 as far as DeltaCache says. Raises IndexError for a slot that is none,
    ValueError for a draft that is too long.
    """
    num_heads, value_dim = A_log_H.shape[0], norm_weight_V.shape[0]
    num_channels, _, width = conv_weight_C1W.shape
    num_tokens, num_sequences = qkvz_TX.shape[0], packing.num_sequences
    assert packing.device.type == "cpu"
    if (
        num_heads % num_key_heads
        or num_channels != 2 * num_key_heads * key_head_dim + num_heads * value_dim
        or qkvz_TX.shape[1] != num_channels + num_heads * value_dim
        or ba_TY.shape != (num_tokens, 2 * num_heads)
        or dt_bias_H.shape[0] != num_heads
        or num_tokens != packing.num_tokens
    ):
        raise ValueError(
            f"projections {tuple(qkvz_TX.shape)} and {tuple(ba_TY.shape)} do not fit {num_key_heads} key heads of "
            f"{key_head_dim}, {num_heads} value heads of {value_dim} and {num_channels} channels"
        )
    if cache is None:
        cache = DeltaCache(
            conv=torch.empty((num_sequences, width - 1, num_channels), dtype=torch.float32),
            state=torch.empty((num_sequences, num_heads, key_head_dim, value_dim), dtype=torch.float32),
            slots_N=torch.arange(num_sequences),
            is_fresh_N=torch.ones(num_sequences, dtype=torch.bool),
        )
    _check_cache(cache, num_sequences, (width - 1, num_channels), (num_heads, key_head_dim, value_dim))
    qkvz_TX, ba_TY, conv_weight_C1W = _plain(qkvz_TX), _plain(ba_TY), _plain(wide(conv_weight_C1W))
    A_log_H, dt_bias_H, norm_weight_V = wide(A_log_H), wide(dt_bias_H), wide(norm_weight_V)
    facts = (cache.is_draft_N, cache.context_lengths_N, cache.prompt_lengths_N)
    out_TZ = torch.empty((num_tokens, num_heads * value_dim), dtype=torch.float32)
    native.gated_delta_mixer(
        qkvz_TX.data_ptr(), ba_TY.data_ptr(), conv_weight_C1W.data_ptr(), A_log_H.data_ptr(), dt_bias_H.data_ptr(),
        norm_weight_V.data_ptr(), eps, num_sequences, packing.cu_seqlens.data_ptr(), cache.slots_N.data_ptr(),
        cache.is_fresh_N.data_ptr() if cache.has_fresh else 0,
        *(0 if x is None else x.data_ptr() for x in facts),
        cache.state.shape[0], _slots(native, cache.conv, cache.state, cache.pending), out_TZ.data_ptr(),
    )  # fmt: skip
    return out_TZ


def apply_pending(native: ModuleType, conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """See ops.apply_pending. Raises IndexError for a slot, or a number of accepted tokens, that is none."""
    pending.check_sizes(conv, state)
    _check_numbers(slots_N, torch.int64, slots_N.shape[0])
    native.apply_pending(
        _slots(native, conv, state, pending), slots_N.data_ptr(), slots_N.shape[0], state.shape[0]
    )  # fmt: skip


def _slots(native: ModuleType, conv: Tensor, state: Tensor, pending: PendingTokens | None) -> Any:
    """The memory of one layer as the kernels know it."""
    _, num_heads, key_dim, value_dim = state.shape
    num_key_heads = (conv.shape[2] - num_heads * value_dim) // (2 * key_dim)
    addresses = [0] * 6 if pending is None else [pending.num_drafts, *(x.data_ptr() for x in pending)]
    return native.DeltaSlots(
        num_key_heads, num_heads, key_dim, value_dim, conv.shape[1] + 1, conv.data_ptr(), state.data_ptr(),
        state.dtype == torch.bfloat16, *addresses,
    )  # fmt: skip


def _check_cache(
    cache: DeltaCache, num_sequences: int, conv_shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> None:
    conv, state = cache.conv, cache.state
    if conv.shape[1:] != conv_shape or state.shape[1:] != state_shape or conv.shape[0] != state.shape[0]:
        raise ValueError(
            f"slots of {tuple(conv.shape)} and {tuple(state.shape)} numbers, not of {conv_shape} and {state_shape}"
        )
    cache.check_pending()
    _check_numbers(cache.slots_N, torch.int64, num_sequences)
    _check_numbers(cache.is_fresh_N, torch.bool, num_sequences)
    if cache.is_draft_N is not None:
        _check_numbers(cache.is_draft_N, torch.bool, num_sequences)
    for lengths_N in (cache.context_lengths_N, cache.prompt_lengths_N):
        if lengths_N is not None:
            _check_numbers(lengths_N, torch.int64, num_sequences)
    if cache.pending is not None:
        _check_numbers(cache.pending.num_accepted, torch.int64, state.shape[0])


def _check_numbers(numbers: Tensor, dtype: torch.dtype, size: int) -> None:
    assert numbers.dtype == dtype and numbers.shape == (size,)
    assert numbers.is_contiguous() and numbers.is_cpu


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.is_cpu


def _is_state(tensor: Tensor) -> bool:
    return tensor.dtype in _STATE_DTYPES and tensor.is_contiguous() and tensor.is_cpu


def _plain(tensor: Tensor) -> Tensor:
    return tensor if _is_plain(tensor) else tensor.detach().to("cpu", torch.float32).contiguous()
