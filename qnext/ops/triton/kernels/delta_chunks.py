"""The gated delta rule in chunks: a program walks through a sequence with some columns of a head's state.

Tiles hold features by tokens, [V, C] and [K, C], and the state its transpose: the long side of a product is shared out
among warps, where sixteen tokens would be computed by each of them.

Legend: N sequences, J key heads, H value heads, K and V key and value head dims, B chunks, C tokens of a chunk, S a
transposed state [V, K], G the running sum of log decays inside a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiplied(a, b, IS_WIDE: tl.constexpr):
    """a b with sums in fp32, of fp32 operands as three TF32 products, or of operands rounded to bf16."""
    if IS_WIDE:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))


@triton.jit
def solved(A_CC, u_VC, at_C, count):
    """u (I + A)^-T for A below the diagonal, by forward substitution over the first `count` tokens."""
    for i in range(1, count):
        row_C = tl.sum(tl.where(at_C[:, None] == i, A_CC, 0.0), axis=0)
        known_V = tl.sum(row_C[None, :] * u_VC, axis=1)
        u_VC = tl.where(at_C[None, :] == i, u_VC - known_V[:, None], u_VC)
    return u_VC


@triton.jit
def decays(g_C, at_C):
    """Between two tokens of a chunk, from a token to the end, and from the beginning to a token.

    They are exponentials of sums of the decays between, not of differences of sums: a forgetful token would take their
    digits.
    """
    steps_CC = tl.where(at_C[:, None] > at_C[None, :], g_C[:, None], 0.0)
    return tl.exp(tl.cumsum(steps_CC, axis=0)), tl.exp(tl.sum(steps_CC, axis=0)), tl.exp(tl.cumsum(g_C, axis=0))


@triton.jit
def pairs(q_KC, k_KC, decay_CC, beta_C, at_C, IS_WIDE: tl.constexpr):
    """A and the scores of a chunk: of each token with those before it, and with those and itself."""
    k_CK = tl.trans(k_KC)
    A_CC = multiplied(k_CK, k_KC, IS_WIDE) * decay_CC * beta_C[:, None]
    scores_CC = multiplied(tl.trans(q_KC), k_KC, IS_WIDE) * decay_CC
    is_below_CC = at_C[:, None] > at_C[None, :]
    return tl.where(is_below_CC, A_CC, 0.0), tl.where(at_C[:, None] >= at_C[None, :], scores_CC, 0.0)


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
    chunks_ptr,
    kept_states_ptr,
    kept_u_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    HAS_STATE: tl.constexpr,
    KEEPS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some values of one head of one sequence: their outputs and their last state.

    The writes u of a chunk solve (I + A) u = beta (v - exp(G) k S), where A_ij = beta_i (k_i . k_j) exp(G_i - G_j).
    With KEEPS the state before each chunk and u are written too, for the gradient.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = h // (num_heads // num_key_heads)
    start = tl.load(starts_ptr + n)
    length = (tl.load(starts_ptr + n + 1) - start).to(tl.int32)
    at_C, at_K = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    at_V = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_in_K, is_in_V = at_K < key_dim, at_V < value_dim
    inner_VK = at_K[None, :] * value_dim + at_V[:, None]
    state_at = (n * num_heads + h) * key_dim * value_dim + inner_VK
    is_in_VK = is_in_V[:, None] & is_in_K[None, :]
    S = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    if HAS_STATE:
        S += tl.load(state_ptr + state_at, mask=is_in_VK, other=0.0)
    for first in range(0, length, BLOCK_C):
        token_C, is_in_C = start + first + at_C, first + at_C < length
        is_in_KC, is_in_VC = is_in_K[:, None] & is_in_C[None, :], is_in_V[:, None] & is_in_C[None, :]
        key_at = j * key_dim + at_K[:, None]
        k_KC = tl.load(k_ptr + token_C[None, :] * k_stride + key_at, mask=is_in_KC, other=0.0)
        q_KC = tl.load(q_ptr + token_C[None, :] * q_stride + key_at, mask=is_in_KC, other=0.0)
        v_at = v_ptr + token_C[None, :] * v_stride + h * value_dim + at_V[:, None]
        v_VC = tl.load(v_at, mask=is_in_VC, other=0.0)
        g_C = tl.load(g_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        beta_C = tl.load(beta_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        decay_CC, outflow_C, growth_C = decays(g_C, at_C)
        A_CC, scores_CC = pairs(q_KC, k_KC, decay_CC, beta_C, at_C, IS_WIDE)
        u_VC = beta_C[None, :] * (v_VC - growth_C[None, :] * multiplied(S, k_KC, IS_WIDE))
        u_VC = solved(A_CC, u_VC, at_C, tl.minimum(length - first, BLOCK_C))
        o_VC = growth_C[None, :] * multiplied(S, q_KC, IS_WIDE) + multiplied(u_VC, tl.trans(scores_CC), IS_WIDE)
        o_at = (token_C[None, :] * num_heads + h) * value_dim + at_V[:, None]
        tl.store(o_ptr + o_at, o_VC / tl.sqrt(key_dim * 1.0), mask=is_in_VC)
        if KEEPS:
            chunk = tl.load(chunks_ptr + n) + first // BLOCK_C
            kept_at = kept_states_ptr + (chunk * num_heads + h) * key_dim * value_dim + inner_VK
            tl.store(kept_at, S, mask=is_in_VK)
            tl.store(kept_u_ptr + o_at, u_VC, mask=is_in_VC)
        S = tl.exp(tl.sum(g_C, axis=0)) * S + multiplied(outflow_C[None, :] * u_VC, tl.trans(k_KC), IS_WIDE)
    tl.store(last_state_ptr + state_at, S, mask=is_in_VK)
