"""Where experts are placed by measured loads, and that it changes no bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.placement import ExpertPlacement, place_by_load
from qnext.parallel.shard import RankShard
from tests.model.models import make_model, random_tokens
from tests.parallel.ranks import MemoryLink, on_all_ranks
from tests.parallel.test_forward import CONFIGS, rows


def heaviest(placement: ExpertPlacement, layer: int, tokens: list[int]) -> float:
    """Load of the rank that has the most, where ranks share the tokens of a copied expert."""
    owners = placement.owners(layer)
    loads = [0.0] * placement.num_ranks
    for expert, ranks in enumerate(owners):
        for rank in ranks:
            loads[rank] += tokens[expert] / len(ranks)
    return max(loads)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_have_equal_loads_as_far_as_they_can(num_ranks: int) -> None:
    rng = random.Random(num_ranks)
    tokens = [int(1000 * rng.random() ** 6) for _ in range(48)]
    even = heaviest(ExpertPlacement(num_ranks, 48), 0, tokens)
    placed = place_by_load({0: tokens}, num_ranks=num_ranks, num_copies=0)
    copied = place_by_load({0: tokens}, num_ranks=num_ranks, num_copies=6)
    mean = sum(tokens) / num_ranks
    assert heaviest(placed, 0, tokens) < even and heaviest(placed, 0, tokens) <= mean + max(tokens)
    assert heaviest(copied, 0, tokens) <= 1.05 * mean
    numbers = [len(copied.experts_of(0, rank)) for rank in range(num_ranks)]
    assert sum(numbers) == 54 and max(numbers) == -(-54 // num_ranks)


def test_one_hot_expert_is_on_all_ranks() -> None:
    placed = place_by_load({3: [100, 1, 1, 1]}, num_ranks=2, num_copies=1)
    assert placed.owners(3)[0] == [0, 1] and all(len(ranks) == 1 for ranks in placed.owners(3)[1:])
    assert placed.owners(0) == [[0], [0], [1], [1]], "a layer that is not named"


def test_more_copies_than_there_can_be() -> None:
    placed = place_by_load({0: [5, 3, 2]}, num_ranks=2, num_copies=100)
    assert placed.owners(0) == [[0, 1]] * 3


def test_copies_change_no_bit(tmp_path: Path) -> None:
    """And each rank computes some tokens of an expert that both have."""
    config = CONFIGS["sparse"]
    save_model(make_model(config, dtype=torch.bfloat16), tmp_path / "m")
    tokens_T = random_tokens(config, 23)
    loads = {layer: [100, *range(1, config.num_experts)] for layer in range(config.num_hidden_layers)}
    placement = place_by_load(loads, num_ranks=2, num_copies=3)
    assert any(len(ranks) == 2 for ranks in placement.owners(0))

    def run(mesh: Mesh, link: MemoryLink) -> list[torch.Tensor]:
        shard = replace(RankShard.of(config, mesh), placement=placement)
        return rows(load_model(tmp_path / "m", on_rank=OnRank(shard, link)), tokens_T)

    alone = rows(load_model(tmp_path / "m"), tokens_T)
    for found in on_all_ranks(2, 1, run):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))
