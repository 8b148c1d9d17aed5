"""The token mixers. Each is one fused op between its projections. The first backend that serves a call computes it.

Legend: T tokens, N sequences, H query or value heads, G KV heads, J key heads, R value heads per key head, K and V key
and value head dims, C channels of the convolution, X and Y widths of the projections, Z = H * V.
"""

from __future__ import annotations

from torch import Tensor

from qnext.ops.caches import AttentionCache, DeltaCache, PendingTokens
from qnext.ops.choice import run
from qnext.ops.inference_forward import with_inference_forward
from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, DeltaInputs, DeltaOutput, DeltaWeights, Rope


@with_inference_forward
def attention_mixer(
    q_TX: Tensor,
    k_TY: Tensor,
    v_TY: Tensor,
    weights: AttentionWeights,
    *,
    rope: Rope,
    packing: Packing,
    cache: AttentionCache | None = None,
) -> Tensor:
    """[T, H * K]: from the outputs of the projections q, k, v to the input of the projection o.

    Queries and keys are normalised per head, and their first dims are rotated. Each query attends causally to its
    sequence: to the tokens of the call, or with a cache to its pages, where the new keys and values are written first.
    The output is multiplied by sigmoid(gate) where there is a gate. Native kernels raise IndexError for places outside
    the pages.
    """
    return run("attention_mixer", q_TX, k_TY, v_TY, weights, rope=rope, packing=packing, cache=cache)


@with_inference_forward
def gated_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> Tensor:
    """[T, Z]: convolution, L2 norm of q and k, gates, delta rule and gated norm, between the projections.

    Per key head `qkvz_TX` holds q (K), k (K), v (R * V), z (R * V), and `ba_TY` b (R), a (R). The channels of the
    convolution are all q, then all k, then all v. Every sequence continues from its slot of `cache`, which is updated
    in place, or starts from zeros. Kernels take heads of multiples of 16 dims and fp32 slots; the state may be bf16
    too. The bits of a token do not depend on cuts and drafts: see DeltaCache.
    """
    return run("gated_delta_mixer", qkvz_TX, ba_TY, weights, packing=packing, cache=cache)


def gated_delta_rule(inputs: DeltaInputs, *, packing: Packing, initial_state_NHKV: Tensor | None = None) -> DeltaOutput:
    """Per value head h with key head h // (H / J), from the initial state or zeros:

        S <- exp(g_t) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = S^T q_t / sqrt(K)

    q and k are L2-normalised by the caller; g <= 0 is the log decay, beta in [0, 1]. Output in the dtype of v, state in
    fp32 (fp64 for fp64 inputs). Gradients reach all inputs and the initial state.
    """
    return run("gated_delta_rule", inputs, packing=packing, initial_state_NHKV=initial_state_NHKV)


def apply_pending(conv: Tensor, state: Tensor, pending: PendingTokens, slots_N: Tensor) -> None:
    """Makes the accepted pending tokens of these slots, all different, a part of `conv` and `state`, in place.

    Call it before the states are read or copied; the mixer does it by itself. The native kernel gives the bits that the
    states would have without drafts.
    """
    run("apply_pending", conv, state, pending, slots_N)
