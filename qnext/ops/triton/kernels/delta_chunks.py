"""The gated delta rule in chunks: a program walks through a sequence with some columns of a head's state.

Legend: N sequences, J key heads, H value heads, K and V key and value head dims, C tokens of a chunk, S a state [K, V],
G the running sum of log decays inside a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def solved(A_CC, u_CV, at_C, count):
    """(I + A)^-1 u for A below the diagonal, by forward substitution over the first `count` rows."""
    for i in range(1, count):
        row_C = tl.sum(tl.where(at_C[:, None] == i, A_CC, 0.0), axis=0)
        known_V = tl.sum(row_C[:, None] * u_CV, axis=0)
        u_CV = tl.where(at_C[:, None] == i, u_CV - known_V[None, :], u_CV)
    return u_CV


@triton.jit
def delta_chunks_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    starts_ptr,
    state_ptr,
    o_ptr,
    last_state_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    HAS_STATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some values of one head of one sequence: their outputs and their last state.

    The writes u of a chunk solve (I + A) u = beta (v - exp(G) k S), where A_ij = beta_i (k_i . k_j) exp(G_i - G_j).
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = h // (num_heads // num_key_heads)
    start = tl.load(starts_ptr + n)
    length = (tl.load(starts_ptr + n + 1) - start).to(tl.int32)
    at_C, at_K = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    at_V = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_in_K, is_in_V = at_K < key_dim, at_V < value_dim
    state_at = (n * num_heads + h) * key_dim * value_dim + at_K[:, None] * value_dim + at_V[None, :]
    is_in_KV = is_in_K[:, None] & is_in_V[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_STATE:
        S += tl.load(state_ptr + state_at, mask=is_in_KV, other=0.0)
    for first in range(0, length, BLOCK_C):
        token_C, is_in_C = start + first + at_C, first + at_C < length
        is_in_CK, is_in_CV = is_in_C[:, None] & is_in_K[None, :], is_in_C[:, None] & is_in_V[None, :]
        key_at = j * key_dim + at_K[None, :]
        k_CK = tl.load(k_ptr + token_C[:, None] * k_stride + key_at, mask=is_in_CK, other=0.0)
        v_at = v_ptr + token_C[:, None] * v_stride + h * value_dim + at_V[None, :]
        v_CV = tl.load(v_at, mask=is_in_CV, other=0.0)
        g_C = tl.load(g_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        beta_C = tl.load(beta_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        # sums of the decays between two tokens, not differences of sums: a forgetful token would take their digits
        steps_CC = tl.where(at_C[:, None] > at_C[None, :], g_C[:, None], 0.0)
        decay_CC, outflow_C = tl.exp(tl.cumsum(steps_CC, axis=0)), tl.exp(tl.sum(steps_CC, axis=0))
        growth_C1 = tl.exp(tl.cumsum(g_C, axis=0))[:, None]
        k_KC = tl.trans(k_CK)
        mixing_CC = tl.dot(k_CK, k_KC, input_precision="tf32x3") * decay_CC * beta_C[:, None]
        mixing_CC = tl.where(at_C[:, None] > at_C[None, :], mixing_CC, 0.0)
        u_CV = beta_C[:, None] * (v_CV - growth_C1 * tl.dot(k_CK, S, input_precision="tf32x3"))
        u_CV = solved(mixing_CC, u_CV, at_C, tl.minimum(length - first, BLOCK_C))
        q_CK = tl.load(q_ptr + token_C[:, None] * q_stride + key_at, mask=is_in_CK, other=0.0)
        scores_CC = tl.dot(q_CK, k_KC, input_precision="tf32x3") * decay_CC
        scores_CC = tl.where(at_C[:, None] >= at_C[None, :], scores_CC, 0.0)
        o_CV = growth_C1 * tl.dot(q_CK, S, input_precision="tf32x3")
        o_CV += tl.dot(scores_CC, u_CV, input_precision="tf32x3")
        o_at = o_ptr + (token_C[:, None] * num_heads + h) * value_dim + at_V[None, :]
        tl.store(o_at, o_CV / tl.sqrt(key_dim * 1.0), mask=is_in_CV)
        S = tl.exp(tl.sum(g_C, axis=0)) * S + tl.dot(k_KC, outflow_C[:, None] * u_CV, input_precision="tf32x3")
    tl.store(last_state_ptr + state_at, S, mask=is_in_KV)
