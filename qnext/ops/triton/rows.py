"""Operations on rows by GPU kernels. Legend: T tokens, D the normalised dim, E experts, A experts per token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.checks import check_norm, check_route
from qnext.ops.records import Routing
from qnext.ops.triton.sizes import next_power_of_2, num_warps
from qnext.ops.triton.trust import is_trusted, numbers, take

_MAX_ROW = 1 << 15  # numbers of a row that one program holds
_MAX_EXPERTS = 4096


def serves_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> bool:
    """Whether a program can hold a row, and no gradient is wanted."""
    return take(x, weight_D) and 0 < x.shape[-1] <= _MAX_ROW and x.numel() > 0 and is_trusted(try_rms_norm, x.device)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm. Computed in fp32 and cast once."""
    check_norm(x, weight_D)
    return _normed(x, weight_D, None, eps=eps, zero_centered=zero_centered)


def _normed(x: Tensor, weight_D: Tensor, gate: Tensor | None, *, eps: float, zero_centered: bool) -> Tensor:
    from qnext.ops.triton.kernels.norm import rms_norm_kernel

    size = x.shape[-1]
    rows, weight_D = _rows(x), weight_D.contiguous()
    gates = rows if gate is None else _rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    rms_norm_kernel[(len(rows),)](
        rows,
        weight_D,
        gates,
        out,
        rows.stride(0),
        gates.stride(0),
        size,
        eps,
        ZERO_CENTERED=zero_centered,
        HAS_GATE=gate is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """[rows, D] whose numbers lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def try_rms_norm(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(3, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        wanted = reference.rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered)
        yield rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered), wanted


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
    logits_TE = _rows(logits_TE)
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
