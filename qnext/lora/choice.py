"""Which experts are worth adapting: those that the user's data is sent to.

Legend: L routers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, Router, RouterOutput
from qnext.planning import Kind, list_parameters


def router_layers(model: CausalLM) -> list[int]:
    """The layers that have a router, in order; the MTP layer is the last."""
    infos = list_parameters(model.config).values()
    return [info.layer for info in infos if info.kind is Kind.ROUTER and info.layer is not None]


@torch.no_grad()
def count_routing(model: CausalLM, batches: Iterable[Batch]) -> Tensor:
    """int64 [L, E]: how many tokens of `batches` each router sends to each expert, layers as in router_layers.

    The MTP layer reads each token's successor in the same document, or the token itself where it is the last.
    """
    layers, num_experts = router_layers(model), model.config.num_experts
    if not layers:
        raise UsageError("the model has no routed experts")
    counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64)
    routers = [module for module in model.modules() if isinstance(module, Router)]

    def count(place: int, output: RouterOutput) -> None:
        counts_LE[place] += torch.bincount(output.routing.experts_TA.flatten().cpu(), minlength=num_experts)

    def hook(place: int) -> object:
        return lambda module, inputs, output: count(place, output)

    handles = [router.register_forward_hook(hook(i)) for i, router in enumerate(routers)]  # type: ignore[arg-type]
    try:
        for batch in batches:
            trunk = model(batch)
            if model.mtp is not None:
                ends_N = torch.tensor(batch.packing.lengths).cumsum(0) - 1
                next_T = batch.token_ids_T.roll(-1)
                next_T[ends_N] = batch.token_ids_T[ends_N]
                model.draft_hidden(next_T, trunk, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts_LE


def choose_experts(model: CausalLM, counts_LE: Tensor, *, coverage: float) -> dict[int, tuple[int, ...]]:
    """By layer, the fewest experts that got at least `coverage` of its assignments, the busiest first chosen."""
    if not 0.0 < coverage <= 1.0:
        raise UsageError(f"coverage must be above 0 and at most 1, not {coverage}")
    chosen = {}
    for layer, counts_E in zip(router_layers(model), counts_LE, strict=True):
        order_E = counts_E.argsort(descending=True, stable=True)
        covered_E = counts_E[order_E].cumsum(0)
        needed = int((covered_E < coverage * int(covered_E[-1])).sum()) + 1
        busy = order_E[:needed]
        chosen[layer] = tuple(sorted(busy[counts_E[busy] > 0].tolist()))
    return chosen
