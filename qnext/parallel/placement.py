"""Which rank has which experts. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qnext.parallel.mesh import span


@dataclass(frozen=True)
class ExpertPlacement:
    """Of each layer, by its index, the experts of each rank in ascending order. In a layer that is not named each rank
    has as many neighbours as the others. An expert may be on several ranks; each is on one at least."""

    num_ranks: int
    num_experts: int
    of_layer: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, ranks in self.of_layer.items():
            assert len(ranks) == self.num_ranks, layer
            assert {expert for experts in ranks for expert in experts} == set(range(self.num_experts)), layer
            assert all(list(experts) == sorted(set(experts)) for experts in ranks), layer

    def experts_of(self, layer: int, rank: int) -> tuple[int, ...]:
        if layer in self.of_layer:
            return self.of_layer[layer][rank]
        return tuple(range(*span(self.num_experts, self.num_ranks, rank)))

    def owners(self, layer: int) -> list[list[int]]:
        """The ranks that have each expert."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank in range(self.num_ranks):
            for expert in self.experts_of(layer, rank):
                found[expert].append(rank)
        return found


def place_by_load(loads: Mapping[int, Sequence[int]], *, num_ranks: int, num_copies: int) -> ExpertPlacement:
    """Experts so that ranks have equal loads, as far as tokens of the past tell. `loads` has the tokens of each expert
    of each layer. Of the hottest there are `num_copies` more per layer, and ranks have equal numbers of experts, or
    nearly so.

    The hottest, by tokens for each copy, are copied first, and each goes to the rank with the least load that has room.
    """
    found: dict[int, tuple[tuple[int, ...], ...]] = {}
    num_experts = 0
    for layer, tokens in loads.items():
        num_experts = len(tokens)
        counts = [1] * num_experts
        for _ in range(min(num_copies, num_experts * (num_ranks - 1))):
            open_ = (expert for expert in range(num_experts) if counts[expert] < num_ranks)
            counts[max(open_, key=lambda expert: (tokens[expert] / counts[expert], -expert))] += 1
        room = -(-sum(counts) // num_ranks)
        loads_of = [0.0] * num_ranks
        ranks: list[set[int]] = [set() for _ in range(num_ranks)]
        for expert in sorted(range(num_experts), key=lambda expert: (-counts[expert], -tokens[expert], expert)):
            free = [rank for rank in range(num_ranks) if len(ranks[rank]) < room]
            for rank in sorted(free, key=lambda rank: (loads_of[rank], rank))[: counts[expert]]:
                ranks[rank].add(expert)
                loads_of[rank] += tokens[expert] / counts[expert]
        found[layer] = tuple(tuple(sorted(experts)) for experts in ranks)
    return ExpertPlacement(num_ranks, num_experts, found)
