"""The gradient of the gated delta rule in two launches: one walks each sequence from its end, one takes all chunks.

The forward kernel has kept the state before each chunk and the writes u. Gradients of a product that an exponential
scales sum to that of each of its exponents. They are added up for the tokens between, never as differences of sums.

Legend: as in delta_chunks; dX the gradient of X, right_C that of beta (v - exp(G) k S).
"""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.delta_chunks import decays, multiplied, pairs


@triton.jit
def solved_backwards(A_CC, right_VC, at_C, count):
    """right (I + A)^-1 for A below the diagonal, from the last of the first `count` tokens to the first."""
    for step in range(1, count):
        i = count - step
        row_C = tl.sum(tl.where(at_C[:, None] == i, A_CC, 0.0), axis=0)
        known_V = tl.sum(tl.where(at_C[None, :] == i, right_VC, 0.0), axis=1)
        right_VC -= known_V[:, None] * row_C[None, :]
    return right_VC


@triton.jit
def delta_states_backward_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    beta_ptr,
    starts_ptr,
    chunks_ptr,
    grad_o_ptr,
    grad_last_ptr,
    exits_ptr,
    right_ptr,
    grad_state_ptr,
    q_stride,
    k_stride,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    HAS_LAST: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some values of one head of one sequence: the gradient of the state behind each chunk, and of its right side."""
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
    dS = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    if HAS_LAST:
        dS += tl.load(grad_last_ptr + state_at, mask=is_in_VK, other=0.0)
    num_chunks = tl.cdiv(length, BLOCK_C)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        first = chunk * BLOCK_C
        token_C, is_in_C = start + first + at_C, first + at_C < length
        is_in_KC, is_in_VC = is_in_K[:, None] & is_in_C[None, :], is_in_V[:, None] & is_in_C[None, :]
        kept_at = (tl.load(chunks_ptr + n) + chunk) * num_heads + h
        tl.store(exits_ptr + kept_at * key_dim * value_dim + inner_VK, dS, mask=is_in_VK)
        key_at = j * key_dim + at_K[:, None]
        k_KC = tl.load(k_ptr + token_C[None, :] * k_stride + key_at, mask=is_in_KC, other=0.0)
        q_KC = tl.load(q_ptr + token_C[None, :] * q_stride + key_at, mask=is_in_KC, other=0.0)
        g_C = tl.load(g_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        beta_C = tl.load(beta_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        value_at = (token_C[None, :] * num_heads + h) * value_dim + at_V[:, None]
        dO_VC = tl.load(grad_o_ptr + value_at, mask=is_in_VC, other=0.0) / tl.sqrt(key_dim * 1.0)
        decay_CC, outflow_C, growth_C = decays(g_C, at_C)
        A_CC, scores_CC = pairs(q_KC, k_KC, decay_CC, beta_C, at_C, IS_WIDE)
        right_VC = outflow_C[None, :] * multiplied(dS, k_KC, IS_WIDE) + multiplied(dO_VC, scores_CC, IS_WIDE)
        right_VC = solved_backwards(A_CC, right_VC, at_C, tl.minimum(length - first, BLOCK_C))
        tl.store(right_ptr + value_at, right_VC, mask=is_in_VC)
        dS *= tl.exp(tl.sum(g_C, axis=0))
        dS += multiplied(growth_C[None, :] * dO_VC, tl.trans(q_KC), IS_WIDE)
        dS -= multiplied((growth_C * beta_C)[None, :] * right_VC, tl.trans(k_KC), IS_WIDE)
    tl.store(grad_state_ptr + state_at, dS, mask=is_in_VK)


@triton.jit
def products_of_values(
    value_at,
    state_at,
    grad_v_at,
    v_ptrs,
    is_in_C,
    is_in_K,
    beta_C,
    states_ptr,
    exits_ptr,
    u_ptr,
    right_ptr,
    grad_o_ptr,
    grad_v_ptr,
    key_dim,
    value_dim,
    IS_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sums over the values of a head and chunk, and the gradient of v, block by block.

    Gradients of exp(G) q, of beta exp(G) k, of the outflowing k, of scores and of A, and of beta and G in part.
    """
    dQ_in = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    dK_in = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    dK_out = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    dP = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    dA = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    dbeta_C = tl.zeros([BLOCK_C], tl.float32)
    carried_K = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, value_dim, BLOCK_V):
        at_V = first + tl.arange(0, BLOCK_V)
        is_in_VC = (at_V < value_dim)[:, None] & is_in_C[None, :]
        is_in_KV = is_in_K[:, None] & (at_V < value_dim)[None, :]
        S = tl.load(states_ptr + state_at + at_V[None, :], mask=is_in_KV, other=0.0)
        dS = tl.load(exits_ptr + state_at + at_V[None, :], mask=is_in_KV, other=0.0)
        u_VC = tl.load(u_ptr + value_at + at_V[:, None], mask=is_in_VC, other=0.0)
        right_VC = tl.load(right_ptr + value_at + at_V[:, None], mask=is_in_VC, other=0.0)
        dO_VC = tl.load(grad_o_ptr + value_at + at_V[:, None], mask=is_in_VC, other=0.0) / tl.sqrt(key_dim * 1.0)
        v_VC = tl.load(v_ptrs + at_V[:, None], mask=is_in_VC, other=0.0)
        dQ_in += multiplied(S, dO_VC, IS_WIDE)
        dK_in -= multiplied(S, right_VC, IS_WIDE)
        dK_out += multiplied(dS, u_VC, IS_WIDE)
        dP += multiplied(tl.trans(dO_VC), u_VC, IS_WIDE)
        dA -= multiplied(tl.trans(right_VC), u_VC, IS_WIDE)
        dbeta_C += tl.sum(right_VC * v_VC, axis=0)
        carried_K += tl.sum(S * dS, axis=1)
        tl.store(grad_v_ptr + grad_v_at + at_V[:, None], beta_C[None, :] * right_VC, mask=is_in_VC)
    return dQ_in, dK_in, dK_out, dP, dA, dbeta_C, tl.sum(carried_K, axis=0)


@triton.jit
def delta_inputs_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    tokens_ptr,
    lengths_ptr,
    states_ptr,
    exits_ptr,
    u_ptr,
    right_ptr,
    grad_o_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_g_ptr,
    grad_beta_ptr,
    q_stride,
    k_stride,
    v_stride,
    grad_q_stride,
    grad_k_stride,
    grad_v_stride,
    num_key_heads,
    num_heads,
    key_dim,
    value_dim,
    IS_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One chunk of one key head: gradients of q, k and, of each of its value heads, of v, g and beta."""
    chunk, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    repeats = num_heads // num_key_heads
    at_C, at_K = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    token_C, is_in_C = tl.load(tokens_ptr + chunk) + at_C, at_C < tl.load(lengths_ptr + chunk)
    is_in_K = at_K < key_dim
    is_in_KC, key_at = is_in_K[:, None] & is_in_C[None, :], j * key_dim + at_K[:, None]
    is_below_CC, is_seen_CC = at_C[:, None] > at_C[None, :], at_C[:, None] >= at_C[None, :]
    q_KC = tl.load(q_ptr + token_C[None, :] * q_stride + key_at, mask=is_in_KC, other=0.0)
    k_KC = tl.load(k_ptr + token_C[None, :] * k_stride + key_at, mask=is_in_KC, other=0.0)
    qk_CC, kk_CC = multiplied(tl.trans(q_KC), k_KC, IS_WIDE), multiplied(tl.trans(k_KC), k_KC, IS_WIDE)
    dQ_KC = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    dK_KC = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for r in range(repeats):
        h = j * repeats + r
        g_C = tl.load(g_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        beta_C = tl.load(beta_ptr + token_C * num_heads + h, mask=is_in_C, other=0.0)
        decay_CC, outflow_C, growth_C = decays(g_C, at_C)
        dQ_in, dK_in, dK_out, dP, dA, dbeta_C, carried = products_of_values(
            (token_C[None, :] * num_heads + h) * value_dim,
            ((chunk * num_heads + h) * key_dim + at_K[:, None]) * value_dim,
            token_C[None, :] * grad_v_stride + h * value_dim,
            v_ptr + token_C[None, :] * v_stride + h * value_dim,
            is_in_C,
            is_in_K,
            beta_C,
            states_ptr,
            exits_ptr,
            u_ptr,
            right_ptr,
            grad_o_ptr,
            grad_v_ptr,
            key_dim,
            value_dim,
            IS_WIDE,
            BLOCK_C,
            BLOCK_K,
            BLOCK_V,
        )
        dP = tl.where(is_seen_CC, dP, 0.0) * decay_CC
        dA = tl.where(is_below_CC, dA, 0.0) * decay_CC
        along_in_C = tl.sum(dK_in * k_KC, axis=0) * growth_C
        along_out_C = tl.sum(dK_out * k_KC, axis=0) * outflow_C
        dbeta_C += along_in_C + tl.sum(dA * kk_CC, axis=1)
        dA *= beta_C[:, None]
        along_in_C = along_in_C * beta_C + tl.sum(dQ_in * q_KC, axis=0) * growth_C
        flow_CC = dA * kk_CC + dP * qk_CC
        flow_CC = tl.cumsum(flow_CC, axis=1) - flow_CC + along_in_C[:, None]  # of i, from all tokens before t
        dg_C = tl.sum(tl.where(is_seen_CC, flow_CC, 0.0), axis=0)
        dg_C += tl.cumsum(along_out_C, axis=0) - along_out_C + carried * tl.exp(tl.sum(g_C, axis=0))
        tl.store(grad_g_ptr + token_C * num_heads + h, dg_C, mask=is_in_C)
        tl.store(grad_beta_ptr + token_C * num_heads + h, dbeta_C, mask=is_in_C)
        dQ_KC += multiplied(k_KC, tl.trans(dP), IS_WIDE) + dQ_in * growth_C[None, :]
        dK_KC += multiplied(k_KC, dA + tl.trans(dA), IS_WIDE) + multiplied(q_KC, dP, IS_WIDE)
        dK_KC += dK_in * (beta_C * growth_C)[None, :] + dK_out * outflow_C[None, :]
    tl.store(grad_q_ptr + token_C[None, :] * grad_q_stride + key_at, dQ_KC, mask=is_in_KC)
    tl.store(grad_k_ptr + token_C[None, :] * grad_k_stride + key_at, dK_KC, mask=is_in_KC)
