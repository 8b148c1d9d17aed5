"""The choice of experts. One program computes a token. Legend: E experts, A experts of a token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    load_ptr,
    row_stride,
    num_experts,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_LOAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at_E, at_A = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A)
    is_in_E = at_E < num_experts
    logits_E = tl.load(logits_ptr + token * row_stride + at_E, mask=is_in_E, other=float("-inf")).to(tl.float32)
    odds_E = tl.exp(logits_E - tl.max(logits_E, axis=0))
    left_E = tl.where(is_in_E, odds_E / tl.sum(odds_E, axis=0), -1.0)
    weights_A = tl.zeros([BLOCK_A], tl.float32)
    experts_A = tl.zeros([BLOCK_A], tl.int32)
    for a in range(TOP_K):
        best = tl.max(left_E, axis=0)
        # the lowest of equal ones; a row of NaN, which equals nothing, must name an expert too
        expert = tl.minimum(tl.min(tl.where(left_E == best, at_E, BLOCK_E), axis=0), num_experts - 1)
        weights_A = tl.where(at_A == a, best, weights_A)
        experts_A = tl.where(at_A == a, expert, experts_A)
        left_E = tl.where(at_E == expert, -1.0, left_E)
    if RENORMALIZE:
        weights_A = weights_A / tl.sum(weights_A, axis=0)
    is_in_A = at_A < TOP_K
    tl.store(weights_ptr + token * TOP_K + at_A, weights_A, mask=is_in_A)
    tl.store(experts_ptr + token * TOP_K + at_A, experts_A.to(tl.int64), mask=is_in_A)
    if HAS_LOAD:
        tl.atomic_add(load_ptr + experts_A, tl.full([BLOCK_A], 1, tl.int64), mask=is_in_A)
