"""An engine on ranks gives the answers of an engine in one process, to the last bit of their log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.engine import Engine
from qnext.engine.on_ranks import engine_on_ranks, follow_engine
from qnext.parallel.link import DistributedLink
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.shard import RankShard
from tests.model.models import make_model
from tests.parallel.processes import processes
from tests.parallel.ranks import MemoryLink, on_all_ranks
from tests.parallel.test_forward import CONFIGS
from tests.parallel.traffic import CONFIG, Answers, play


def answers_of_one_process(folder: Path, seeds: list[int]) -> list[Answers]:
    return [play(Engine.of(load_model(folder), CONFIG), seed) for seed in seeds]


def answers_of_a_rank(mesh: Mesh, link: MemoryLink | DistributedLink, folder: Path, seeds: list[int]) -> list[Answers]:
    """Nothing of ranks but the first."""
    shard = RankShard.of(read_layout(folder).config, mesh)
    model = load_model(folder, on_rank=OnRank(shard, link))
    found = []
    for seed in seeds:
        if mesh.rank:
            follow_engine(model, CONFIG, link)
            continue
        with engine_on_ranks(model, CONFIG, link) as engine:
            found.append(play(engine, seed))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(CONFIGS["sparse"], dtype=torch.bfloat16), tmp_path / "m")
    return tmp_path / "m"


def test_ranks_answer_as_one_process(folder: Path) -> None:
    """With drafts, cached prefixes and preemption."""
    found = on_all_ranks(2, 2, lambda mesh, link: answers_of_a_rank(mesh, link, folder, [1]))
    assert found[0] == answers_of_one_process(folder, [1])


def test_processes_answer_as_one_process(folder: Path) -> None:
    with processes(2) as ranks:
        assert ranks.run(answers_of_a_rank, folder, [3])[0] == answers_of_one_process(folder, [3])


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "expert"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_fifty_schedules_on_processes(folder: Path, tensor: int, expert: int) -> None:
    seeds = list(range(50))
    with processes(tensor, expert) as ranks:
        assert ranks.run(answers_of_a_rank, folder, seeds)[0] == answers_of_one_process(folder, seeds)
