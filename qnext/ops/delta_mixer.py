"""The token mixer of Gated DeltaNet: which implementation runs. Legend: see qnext.ops.reference.delta_mixer."""

from __future__ import annotations

from torch import Tensor

from qnext.ops.backend import native_module, runs_native
from qnext.ops.cpu.delta import apply_pending as native_apply
from qnext.ops.cpu.delta import fits_mixer, fits_slots
from qnext.ops.cpu.delta import gated_delta_mixer as native_mixer
from qnext.ops.packing import Packing
from qnext.ops.reference.delta_mixer import DeltaCache
from qnext.ops.reference.delta_mixer import gated_delta_mixer as reference_mixer
from qnext.ops.reference.delta_pending import PendingTokens
from qnext.ops.reference.delta_pending import apply_pending as reference_apply


def gated_delta_mixer(
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
    cache: DeltaCache | None = None,
) -> Tensor:
    """What Gated DeltaNet computes between its input projections and its output projection: [T, H * V].

    Per key head `qkvz_TX` holds q (K), k (K), v (R * V), z (R * V) and `ba_TY` b (R), a (R); the channels of the
    convolution are all q, then all k, then all v. Every sequence of `packing` goes on from its slot of `cache`, which
    is updated in place, or starts from zeros. The native kernel takes fp32 on the CPU without gradients, heads whose
    dims are multiples of 16, and slots in fp32, the state's in bf16 too; its result for a token does not depend on how
    tokens are cut into calls and on what was drafted and rejected between them, not in one bit. Drafts, and which cuts
    do matter for states in bf16: see DeltaCache.
    """
    if runs_native(qkvz_TX, ba_TY, conv_weight_C1W, A_log_H, dt_bias_H, norm_weight_V):
        native = native_module()
        if native is not None and fits_mixer(native, conv_weight_C1W, norm_weight_V, key_head_dim, cache):
            return native_mixer(
                native, qkvz_TX, ba_TY, conv_weight_C1W=conv_weight_C1W, A_log_H=A_log_H, dt_bias_H=dt_bias_H,
                norm_weight_V=norm_weight_V, eps=eps, num_key_heads=num_key_heads, key_head_dim=key_head_dim,
                packing=packing, cache=cache,
            )  # fmt: skip
    return reference_mixer(
        qkvz_TX, ba_TY, conv_weight_C1W=conv_weight_C1W, A_log_H=A_log_H, dt_bias_H=dt_bias_H,
        norm_weight_V=norm_weight_V, eps=eps, num_key_heads=num_key_heads, key_head_dim=key_head_dim,
        packing=packing, cache=cache,
    )  # fmt: skip


def apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """Makes the accepted pending tokens of these slots, all different, a part of `conv` and `state`, in place.

    For whoever wants to read or copy the states: a call of the mixer does it by itself. The native kernel gives the
    bits that the states would have had without drafts.
    """
    native = native_module()
    if native is not None and fits_slots(native, conv, state, pending):
        native_apply(native, conv, state, pending, slots_N)
    else:
        reference_apply(conv, state, pending, slots_N)
