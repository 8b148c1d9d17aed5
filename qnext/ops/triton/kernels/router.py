"""The choice of experts, alone or behind the product that gives the scores. Legend: E experts, A experts of a token."""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton.kernels.last import is_last
from qnext.ops.triton.kernels.matrices import normed_product, store_normed


@triton.jit
def choose(
    token,
    logits_ptr,
    weights_ptr,
    experts_ptr,
    load_ptr,
    num_experts,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_LOAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Writes the experts of one token, from its logits.

    A probability and the number of its expert are one whole number, the lowest expert the greatest of equal ones, so
    that a single maximum finds both.
    """
    at_E, at_A = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A)
    is_in_E = at_E < num_experts
    logits_E = tl.load(logits_ptr + at_E, mask=is_in_E, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
    odds_E = tl.exp(logits_E - tl.max(logits_E, axis=0))
    bits_E = (odds_E / tl.sum(odds_E, axis=0)).to(tl.int32, bitcast=True).to(tl.int64)
    left_E = tl.where(is_in_E, (bits_E << 32) + (BLOCK_E - 1 - at_E), -1)
    best_A = tl.zeros([BLOCK_A], tl.int64)
    for a in range(TOP_K):
        best = tl.max(left_E, axis=0)
        best_A = tl.where(at_A == a, best, best_A)
        left_E = tl.where(left_E == best, -1, left_E)
    is_in_A = at_A < TOP_K
    # a row of NaN, whose bits may be negative, must name an expert too
    experts_A = tl.minimum(tl.maximum(BLOCK_E - 1 - (best_A & 0xFFFFFFFF), 0), num_experts - 1)
    weights_A = tl.where(is_in_A, (best_A >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    if RENORMALIZE:
        weights_A = weights_A / tl.sum(weights_A, axis=0)
    tl.store(weights_ptr + token * TOP_K + at_A, weights_A, mask=is_in_A)
    tl.store(experts_ptr + token * TOP_K + at_A, experts_A, mask=is_in_A)
    if HAS_LOAD:
        tl.atomic_add(load_ptr + experts_A, tl.full([BLOCK_A], 1, tl.int64), mask=is_in_A)


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
    """One program computes a token."""
    token = tl.program_id(0).to(tl.int64)
    choose(
        token,
        logits_ptr + token * row_stride,
        weights_ptr,
        experts_ptr,
        load_ptr,
        num_experts,
        TOP_K,
        RENORMALIZE,
        HAS_LOAD,
        BLOCK_E,
        BLOCK_A,
    )


@triton.jit
def normed_route_kernel(
    x_ptr,
    norm_ptr,
    rows_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    logits_ptr,
    weights_ptr,
    experts_ptr,
    load_ptr,
    counters_ptr,
    x_stride,
    num_rows,
    num_inputs,
    eps,
    num_experts,
    FORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_LOAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """norm(x), the logits of some experts for some tokens; and by the last program of these tokens their choice."""
    tile, block = tl.program_id(0), tl.program_id(1)
    at_T = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rows = (x_ptr, norm_ptr, at_T, x_stride, num_rows, num_inputs)
    memory = (weight_ptr, scales_ptr, zeros_ptr, logits_ptr, num_experts)
    root_T = normed_product(tile, *rows, eps, *memory, FORM, ZERO_CENTERED, IS_WIDE, BLOCK_F)
    store_normed(tile, tl.num_programs(0), *rows, root_T, rows_ptr, ZERO_CENTERED, FORM[4])
    if is_last(counters_ptr + block, tl.num_programs(0)):
        for token in range(block * BLOCK_T, tl.minimum((block + 1) * BLOCK_T, num_rows)):
            choose(
                token,
                logits_ptr + token * num_experts,
                weights_ptr,
                experts_ptr,
                load_ptr,
                num_experts,
                TOP_K,
                RENORMALIZE,
                HAS_LOAD,
                BLOCK_E,
                BLOCK_A,
            )
