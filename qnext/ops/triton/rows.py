"""Operations on rows by GPU kernels. Legend: T tokens, D the normalised dim, E experts, A experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.checks import check_norm, check_route
from qnext.ops.records import Routing
from qnext.ops.triton.sizes import next_power_of_2, num_warps
from qnext.ops.triton.train_rows import MAX_ROW, NormForm, normed, rows_of, trained_rms_norm
from qnext.ops.triton.trust import compared, is_trusted, numbers, take, train, wants_gradients

_MAX_EXPERTS = 4096


def serves_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> bool:
    """Whether a program can hold a row."""
    if not 0 < x.shape[-1] <= MAX_ROW or x.numel() == 0:
        return False
    if wants_gradients(x, weight_D):
        return train(x, weight_D) and is_trusted(try_rms_norm_gradient, x.device)
    return take(x, weight_D) and is_trusted(try_rms_norm, x.device)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm. Computed in fp32 and cast once."""
    check_norm(x, weight_D)
    if wants_gradients(x, weight_D):
        return trained_rms_norm(x, weight_D, eps=eps, zero_centered=zero_centered)
    return normed(x, weight_D, NormForm(eps, zero_centered))


def try_rms_norm(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(3, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        wanted = reference.rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered)
        yield rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered), wanted


def try_rms_norm_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(70, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        norm: dict[str, Any] = {"eps": 1e-6, "zero_centered": zero_centered}
        yield from compared(partial(rms_norm, **norm), partial(reference.rms_norm, **norm), x_TD, weight_D)


def serves_route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> bool:
    """Whether a program can hold the scores, and no choice is replayed."""
    return (
        take(logits_TE)
        and chosen_TA is None
        and 0 < logits_TE.shape[1] <= _MAX_EXPERTS
        and len(logits_TE) > 0
        and is_trusted(try_route, logits_TE.device)
    )


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> Routing:
    """See ops.route. Of equal scores the one of the lowest number wins."""
    from qnext.ops.triton.kernels.router import route_kernel

    check_route(logits_TE, top_k, load_E, chosen_TA)
    assert chosen_TA is None, "ask whether it serves first"
    num_tokens, num_experts = logits_TE.shape
    logits_TE = rows_of(logits_TE)
    weights_TA = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    experts_TA = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits_TE.device)
    block = next_power_of_2(num_experts)
    route_kernel[(num_tokens,)](
        logits_TE,
        weights_TA,
        experts_TA,
        experts_TA if load_E is None else load_E,
        logits_TE.stride(0),
        num_experts,
        TOP_K=top_k,
        RENORMALIZE=norm_topk_prob,
        HAS_LOAD=load_E is not None,
        BLOCK_E=block,
        BLOCK_A=next_power_of_2(top_k),
        num_warps=num_warps(block),
    )
    return Routing(weights_TA, experts_TA)


def try_route(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    logits_TE = numbers(3, 40, seed=0, device=device)
    for norm_topk_prob in (True, False):
        loads = [torch.zeros(40, dtype=torch.int64, device=device) for _ in range(2)]
        ours = route(logits_TE, top_k=5, norm_topk_prob=norm_topk_prob, load_E=loads[0])
        theirs = reference.route(logits_TE, top_k=5, norm_topk_prob=norm_topk_prob, load_E=loads[1])
        yield from zip(ours, theirs, strict=True)
        yield loads[0], loads[1]
