"""An engine on ranks gives the answers of an engine in one process, to the last bit of their log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.quantize import quantize_folder
from qnext.checkpoint.streamed import RoomOnRank, plan_residency, readable_records
from qnext.engine import Engine
from qnext.engine.execution.executor import StepOutput
from qnext.engine.execution.ranks import RanksExecutor
from qnext.engine.on_ranks import engine_on_ranks, follow_engine
from qnext.engine.policy.step import StepPlan
from qnext.errors import CorruptCheckpoint, LostRank
from qnext.model import residency_of
from qnext.parallel.link import DistributedLink
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.shard import RankShard
from qnext.quant.scheme import make_policy
from tests.model.models import make_model
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


def test_streamed_codes_answer_as_one_process(folder: Path, tmp_path: Path) -> None:
    """Int4 with most experts on disk: each rank has memory for three records of a layer, and reads its own experts."""
    policy = make_policy("int4-g32", head=None, is_tied=False)
    quantize_folder(folder, tmp_path / "q", policy=policy, with_records=True)
    layout = read_layout(tmp_path / "q")
    record = readable_records(layout)[0].layout.stride
    memory = 3 * record * layout.config.num_hidden_layers
    read: dict[int, set[int]] = {0: set(), 1: set()}

    def run(mesh: Mesh, link: MemoryLink) -> Answers:
        shard = RankShard.of(layout.config, mesh)
        plan = plan_residency(tmp_path / "q", expert_memory=memory, room=RoomOnRank(shard, 1 << 40))
        assert plan is not None
        plan = replace(plan, least_wait_ns=0)
        model = load_model(tmp_path / "q", residency=plan, on_rank=OnRank(shard, link))
        found: Answers = []
        if mesh.rank:
            follow_engine(model, CONFIG, link)
        else:
            with engine_on_ranks(model, CONFIG, link) as engine:
                found = play(engine, 2)
        residency = residency_of(model)
        assert residency is not None and residency.counts()["misses"] and residency.counts()["guesses_used"]
        read[mesh.rank] = {expert for expert, _ in [*residency.residents(0), *residency.others(0)]}
        return found

    alone = play(Engine.of(load_model(tmp_path / "q"), CONFIG), 2)
    assert on_all_ranks(2, 1, run)[0] == alone
    assert read[0] and read[1] and not read[0] & read[1]


class Breaking:
    """An executor that cannot run its second plan."""

    model_config, draft_costs, experts, adapters = CONFIGS["sparse"], None, None, MappingProxyType({})

    def __init__(self, error: BaseException) -> None:
        self.error, self.num_plans, self.is_closed = error, 0, False

    def execute(self, plan: StepPlan) -> StepOutput:
        self.num_plans += 1
        if self.num_plans > 1:
            raise self.error
        return StepOutput(torch.zeros(0, 0), ())

    def close(self, *plans: StepPlan) -> None:
        self.is_closed = True


class Listening:
    """Ranks that keep what they are told."""

    num_local = 1

    def __init__(self) -> None:
        self.orders: list[bytes] = []

    def tell(self, order: bytes) -> None:
        self.orders.append(order)

    def all_broke(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (RuntimeError("x"), "rank 0 could not run a step: RuntimeError", 7),
        (CorruptCheckpoint("f: record 3 is damaged"), "rank 0: f: record 3 is damaged", 5),
        (LostRank("rank 1 was lost: signal 9 ended it"), "rank 1 was lost: signal 9 ended it", 7),
    ],
)
def test_a_step_that_breaks_off_is_the_last_one(error: Exception, line: str, code: int) -> None:
    """Ranks would stand at different places of it: no later step can be right, and nobody hears of an orderly end."""
    own, ranks, ends = Breaking(error), Listening(), []
    executor = RanksExecutor(own, ranks, ends.append)  # type: ignore[arg-type]
    executor.execute(StepPlan(()))
    for _ in range(2):
        with pytest.raises(LostRank) as raised:
            executor.execute(StepPlan(()))
        assert (str(raised.value), raised.value.exit_code) == (line, code)
    executor.close()
    assert own.num_plans == 2 and own.is_closed and len(ranks.orders) == 2 and ends == [False]


def test_an_interrupted_step_is_the_last_one_too() -> None:
    own, ranks, ends = Breaking(KeyboardInterrupt()), Listening(), []
    executor = RanksExecutor(own, ranks, ends.append)  # type: ignore[arg-type]
    executor.execute(StepPlan(()))
    with pytest.raises(KeyboardInterrupt):
        executor.execute(StepPlan(()))
    executor.close()
    assert len(ranks.orders) == 2 and ends == [False]
