"""The choice of experts by GPU kernels, alone and behind the product that gives the scores.

Legend: T tokens, D hidden, E experts, A experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.checks import check_linear, check_norm, check_route
from qnext.ops.records import Norm, NormedRoute, Routing
from qnext.ops.triton.codes import read
from qnext.ops.triton.counters import counters
from qnext.ops.triton.matrices import Tile, is_wide, serves_normed_linears, side_by_side
from qnext.ops.triton.sizes import next_power_of_2, num_warps
from qnext.ops.triton.train_rows import rows_of
from qnext.ops.triton.trust import is_trusted, numbers, take
from qnext.ops.weights import Weight

_MAX_EXPERTS = 4096


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
    logits_TE, routing = rows_of(logits_TE), _empty(num_tokens, top_k, logits_TE.device)
    form = _form(num_experts, top_k, norm_topk_prob, load_E)
    route_kernel[(num_tokens,)](
        logits_TE,
        *routing,
        routing.experts_TA if load_E is None else load_E,
        logits_TE.stride(0),
        num_experts,
        **form,
        num_warps=num_warps(form["BLOCK_E"]),
    )
    return routing


def _empty(num_tokens: int, top_k: int, device: torch.device) -> Routing:
    return Routing(
        torch.empty((num_tokens, top_k), dtype=torch.float32, device=device),
        torch.empty((num_tokens, top_k), dtype=torch.int64, device=device),
    )


def _form(num_experts: int, top_k: int, norm_topk_prob: bool, load_E: Tensor | None) -> dict[str, Any]:
    """What a program that chooses is made for."""
    return {
        "TOP_K": top_k,
        "RENORMALIZE": norm_topk_prob,
        "HAS_LOAD": load_E is not None,
        "BLOCK_E": next_power_of_2(num_experts),
        "BLOCK_A": next_power_of_2(top_k),
    }


def serves_normed_route(
    x_TD: Tensor,
    norm: Norm,
    weight_ED: Tensor | Weight,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> bool:
    """Whether the tokens are few, a program can hold the scores of one, and no choice is replayed."""
    return (
        chosen_TA is None
        and weight_ED.shape[0] <= _MAX_EXPERTS
        and serves_normed_linears(x_TD, norm, (weight_ED,))
        and is_trusted(try_normed_route, x_TD.device)
    )


def normed_route(
    x_TD: Tensor,
    norm: Norm,
    weight_ED: Tensor | Weight,
    *,
    top_k: int,
    norm_topk_prob: bool,
    load_E: Tensor | None = None,
    chosen_TA: Tensor | None = None,
) -> NormedRoute:
    """See ops.normed_route. Logits are rounded to the dtype of the rows before the choice, which is that of route."""
    from qnext.ops.triton.kernels.router import normed_route_kernel

    check_norm(x_TD, norm.weight_D)
    check_linear(x_TD, weight_ED)
    weight, x_TD = read(weight_ED), side_by_side(x_TD)
    (num_rows, num_inputs), num_experts = x_TD.shape, weight_ED.shape[0]
    rows_TD, logits_TE = (
        torch.empty((num_rows, size), dtype=x_TD.dtype, device=x_TD.device) for size in (num_inputs, num_experts)
    )
    check_route(logits_TE, top_k, load_E, chosen_TA)
    routing, tile = _empty(num_rows, top_k, x_TD.device), Tile.of(x_TD, num_experts)
    normed_route_kernel[tile.grid(num_rows, num_experts)](
        x_TD,
        norm.weight_D.contiguous(),
        rows_TD,
        *weight.memory,
        logits_TE,
        *routing,
        routing.experts_TA if load_E is None else load_E,
        counters(x_TD.device),
        x_TD.stride(0),
        num_rows,
        num_inputs,
        norm.eps,
        num_experts,
        FORM=weight.form.at_least(tile.inputs),
        ZERO_CENTERED=norm.zero_centered,
        IS_WIDE=is_wide(x_TD),
        BLOCK_T=tile.rows,
        BLOCK_F=tile.outputs,
        **_form(num_experts, top_k, norm_topk_prob, load_E),
        num_warps=4,
        num_stages=tile.stages,
    )
    return NormedRoute(rows_TD, logits_TE, routing)


def try_route(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    logits_TE = numbers(3, 40, seed=0, device=device)
    for norm_topk_prob in (True, False):
        loads = [torch.zeros(40, dtype=torch.int64, device=device) for _ in range(2)]
        ours = route(logits_TE, top_k=5, norm_topk_prob=norm_topk_prob, load_E=loads[0])
        theirs = reference.route(logits_TE, top_k=5, norm_topk_prob=norm_topk_prob, load_E=loads[1])
        yield from zip(ours, theirs, strict=True)
        yield loads[0], loads[1]


def try_normed_route(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Twice: the second start finds what the first has left."""
    x_TD, weight_ED = numbers(3, 48, seed=0, device=device), numbers(40, 48, seed=1, device=device, scale=0.3)
    norm = Norm(numbers(48, seed=2, device=device, scale=0.2), 1e-6, True)
    loads = [torch.zeros(40, dtype=torch.int64, device=device) for _ in range(2)]
    for _ in range(2):
        how: dict[str, Any] = {"top_k": 5, "norm_topk_prob": True}
        ours = normed_route(x_TD, norm, weight_ED, **how, load_E=loads[0])
        theirs = reference.normed_route(x_TD, norm, weight_ED, **how, load_E=loads[1])
        yield from zip((*ours[:2], *ours.routing, loads[0]), (*theirs[:2], *theirs.routing, loads[1]), strict=True)
