"""An engine on ranks that are processes: the answers of one process, and its ends where a step fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.header import read_index
from qnext.checkpoint.quantize import quantize_folder
from qnext.checkpoint.streamed import RoomOnRank, plan_residency, readable_records
from qnext.engine import Engine, SamplingParams
from qnext.engine.on_ranks import engine_on_ranks, follow_engine
from qnext.model import CausalLM
from qnext.parallel.link import DistributedLink
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.shard import RankShard
from qnext.quant.scheme import make_policy
from tests.model.models import make_model
from tests.parallel.processes import Ranks, processes
from tests.parallel.test_engine import answers_of_a_rank, answers_of_one_process
from tests.parallel.test_forward import CONFIGS
from tests.parallel.traffic import CONFIG

POISON = 99
PROMPTS = [[1, 2, 3, 4], [5, POISON, 7], [8, 9, 10, 11, 12], [3, 1, 4, 1, 5]]
FEW = [[n] for n in (1, 5, 9, 17)]
Ends = list[tuple[list[int], str]]  # of each request its tokens, and why it failed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(CONFIGS["sparse"], dtype=torch.bfloat16), tmp_path / "m")
    return tmp_path / "m"


def ends_of(engine: Engine, prompts: list[list[int]] = PROMPTS) -> Ends:
    """All at once, and one after another once more: the engine goes on."""
    params, found = SamplingParams(max_tokens=3, ignore_eos=True), []
    for group in (prompts, *([prompt] for prompt in prompts)):
        requests = [engine.add_request(prompt, params) for prompt in group]
        while engine.has_unfinished:
            engine.step()
            engine.check_integrity()
        found += [(request.output_ids, str(request.failure or "")) for request in requests]
    return found


def poisoned(model: CausalLM) -> CausalLM:
    """It breaks in its second layer, where ranks have talked already, when it has met a token."""
    seen: list[bool] = []

    def look(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen[:] = [bool((given[0] == POISON).any())]

    def fail(module: torch.nn.Module, given: Any) -> None:
        if seen[0]:
            raise RuntimeError("the poisoned token")

    model.model.embed_tokens.register_forward_pre_hook(look)
    model.model.layers[1].register_forward_pre_hook(fail)
    return model


def ends_of_poisoned(mesh: Mesh, link: DistributedLink, folder: Path) -> Ends:
    """Nothing of ranks but the first."""
    shard = RankShard.of(read_layout(folder).config, mesh)
    model = poisoned(load_model(folder, on_rank=OnRank(shard, link)))
    if mesh.rank:
        follow_engine(model, CONFIG, link)
        return []
    with engine_on_ranks(model, CONFIG, link) as engine:
        return ends_of(engine)


def load_streamed(folder: Path, on_rank: OnRank | None = None) -> CausalLM:
    """With memory for three records of a layer."""
    layout = read_layout(folder)
    memory = 3 * readable_records(layout)[0].layout.stride * layout.config.num_hidden_layers
    room = None if on_rank is None else RoomOnRank(on_rank.shard, 1 << 40)
    return load_model(folder, residency=plan_residency(folder, expert_memory=memory, room=room), on_rank=on_rank)


def ends_of_streamed(mesh: Mesh, link: DistributedLink, folder: Path) -> Ends:
    model = load_streamed(folder, OnRank(RankShard.of(read_layout(folder).config, mesh), link))
    if mesh.rank:
        follow_engine(model, CONFIG, link)
        return []
    with engine_on_ranks(model, CONFIG, link) as engine:
        return ends_of(engine, FEW)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with processes(2) as two:
        yield two


def test_processes_answer_as_one_process(folder: Path, ranks: Ranks) -> None:
    assert ranks.run(answers_of_a_rank, folder, [3])[0] == answers_of_one_process(folder, [3])


def test_a_step_that_fails_on_all_ranks_ends_its_request_alone(folder: Path, ranks: Ranks) -> None:
    alone = ends_of(Engine.of(poisoned(load_model(folder)), CONFIG))
    assert [bool(failure) for _, failure in alone] == [False, True, False, False] * 2
    assert ranks.run(ends_of_poisoned, folder)[0] == alone


def test_a_damaged_record_of_another_rank_ends_those_who_need_it(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    """In one process it is the same line without the rank."""
    policy = make_policy("int4-g32", head=None, is_tied=False)
    quantize_folder(folder, tmp_path / "q", policy=policy, with_records=True)
    stride = readable_records(read_layout(tmp_path / "q"))[0].layout.stride
    damage(tmp_path / "q", "model.layers.1.mlp.experts.records", 5 * stride)
    alone = ends_of(Engine.of(load_streamed(tmp_path / "q"), CONFIG), FEW)
    assert {bool(failure) for _, failure in alone} == {True, False}, "some need expert 5, and some do not"
    assert all("model.layers.1, expert 5: its checksum" in failure for _, failure in alone if failure)
    told = [(ids, failure and f"rank 1: {failure}") for ids, failure in alone]
    assert ranks.run(ends_of_streamed, tmp_path / "q")[0] == told


def damage(folder: Path, tensor: str, place: int) -> None:
    info = read_index(folder).tensors[tensor]
    with info.file.open("r+b") as file:
        file.seek(info.start + place)
        file.write(b"\xff" * 8)


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "expert"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_fifty_schedules_on_processes(folder: Path, tensor: int, expert: int) -> None:
    seeds = list(range(50))
    with processes(tensor, expert) as several:
        assert several.run(answers_of_a_rank, folder, seeds)[0] == answers_of_one_process(folder, seeds)
