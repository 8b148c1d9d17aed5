"""An LLM on ranks, and experts placed by what earlier runs have told."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qnext.engine import SamplingParams
from qnext.errors import LostRank, UsageError
from qnext.session.expert_loads import FILE_NAME, find_placement, keep_loads
from qnext.session.folder import open_model
from qnext.session.llm import LLM
from qnext.session.rank_options import Launched, RankOptions
from tests.cli.test_ranks import children
from tests.server.serving import save_served

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True, seed=3)
PROMPTS = ["Hello", "What is this?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("ranks") / "m")


def test_an_llm_on_ranks_leaves_its_loads_and_nothing_else(folder: Path) -> None:
    """And the next one places its experts by them, with copies: the same answers. A killed rank ends the engine, and
    not the process."""
    with LLM(folder) as alone:
        expected = alone.generate(PROMPTS, GREEDY)
    options, threads = RankOptions(expert_parallel=2, placement="auto"), torch.get_num_threads()
    with LLM(folder, ranks=options) as llm:
        assert llm.generate(PROMPTS, GREEDY) == expected
        with pytest.raises(UsageError, match=r"torch\.distributed is in use"):
            LLM(folder, ranks=options)
        counted = llm.engine.expert_load()
    assert not dist.is_initialized() and torch.get_num_threads() == threads
    assert counted is not None
    kept = json.loads((folder / FILE_NAME).read_text())
    assert [layer["counts"] for layer in kept["layers"]] == [list(layer.tokens) for layer in counted.layers[:-1]]
    model = open_model(str(folder))
    told: list[str] = []
    placement = find_placement(model, RankOptions(expert_parallel=2, placement="auto", copies=2), told.append)
    assert placement is not None and told == []
    assert all(sum(len(ranks) == 2 for ranks in placement.owners(layer)) == 2 for layer in placement.of_layer)
    narrow = {"kv_dtype": torch.int8, "state_dtype": torch.bfloat16}
    with LLM(folder, **narrow) as alone:
        expected = alone.generate(PROMPTS, GREEDY)
    with LLM(folder, ranks=RankOptions(expert_parallel=2, placement="auto", copies=2), **narrow) as llm:
        assert llm.generate(PROMPTS, GREEDY) == expected
        (rank,) = children(os.getpid())
        os.kill(rank, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(LostRank, match=r"^rank 1 was lost: signal 9 ended it$"):
                llm.generate(PROMPTS, GREEDY)
    assert not dist.is_initialized() and children(os.getpid()) == []
    assert sum(json.loads((folder / FILE_NAME).read_text())["layers"][0]["counts"]) > sum(kept["layers"][0]["counts"])


def test_without_loads_one_line_says_what_measures_them(tmp_path: Path) -> None:
    model, told = open_model(str(save_served(tmp_path / "m"))), list[str]()
    assert find_placement(model, RankOptions(expert_parallel=2, placement="auto", copies=2), told.append) is None
    (line,) = told
    assert "placed evenly, and none has copies" in line
    assert f"`qnext experts {tmp_path / 'm'} --text FILE --save-baseline {tmp_path / 'm' / FILE_NAME}`" in line
    keep_loads(model, None)
    assert not (tmp_path / "m" / FILE_NAME).exists()


def test_loads_of_another_model_are_refused(tmp_path: Path) -> None:
    model, file = open_model(str(save_served(tmp_path / "m"))), tmp_path / "loads.json"
    layers = [{"layer": layer, "spread": 1.0, "counts": [1] * 9} for layer in range(2)]
    file.write_text(json.dumps({"form": "qnext expert baseline 1", "model": "m", "layers": layers}))
    with pytest.raises(UsageError, match="a baseline of 2 layers of 9 experts"):
        find_placement(model, RankOptions(expert_parallel=2, placement=str(file)), print)


def test_what_a_launcher_says() -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert Launched.found_in(said) == Launched(3, 4, 2, "a", 29500, local_rank=1)
    elastic = said | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1", "LOCAL_RANK": "0"}
    assert Launched.found_in(elastic) == Launched(3, 4, 2, "a", 29500, True, 1, local_rank=0)
    assert Launched.found_in({name: said[name] for name in ("RANK", "WORLD_SIZE")}) is None
    with pytest.raises(UsageError, match="must be whole numbers"):
        Launched.found_in(said | {"RANK": "first"})
