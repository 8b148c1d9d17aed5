"""Ranks send what the plan says, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.model import Batch
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.shard import RankShard
from qnext.parallel.traffic import TokenTraffic
from tests.model.models import make_model, random_tokens
from tests.parallel.ranks import MemoryLink, on_all_ranks
from tests.parallel.test_forward import CONFIGS, MESHES


@pytest.mark.parametrize(("tensor", "expert"), MESHES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_ranks_send_what_is_planned(tmp_path: Path, name: str, tensor: int, expert: int) -> None:
    """A prompt, a row of logits of its last token, and where there is an MTP layer a draft behind every token."""
    config = CONFIGS[name]
    if expert > 1 and not config.num_experts:
        pytest.skip("has no experts")
    model = make_model(config, dtype=torch.float32)
    save_model(model, tmp_path / "m")
    tokens_T = random_tokens(config, 23)

    def run(mesh: Mesh, link: MemoryLink) -> list[int]:
        model = load_model(tmp_path / "m", on_rank=OnRank(RankShard.of(config, mesh), link))
        batch = Batch.from_lengths(tokens_T, [23])
        trunk = model(batch)
        sent = [link.traffic.num_bytes]
        model.logits(trunk.hidden_TD[-1:])
        sent.append(link.traffic.num_bytes)
        if model.mtp is not None:
            model.logits(model.draft_hidden(tokens_T.roll(-1), trunk, batch))
            sent.append(link.traffic.num_bytes)
        return sent

    planned = TokenTraffic.of(config, Mesh(tensor, expert))
    found = [sum(each) for each in zip(*on_all_ranks(tensor, expert, run), strict=True)]
    prompt = 23 * (planned.embedding + planned.layers(config))
    assert found[:2] == [prompt, prompt + planned.head]
    assert prompt > 0 and planned.decoded(config) == planned.embedding + planned.layers(config) + planned.head
    if config.num_nextn_predict_layers:
        assert found[2] - found[1] == 23 * planned.drafted(config)


def test_activations_in_bf16_are_half_as_many_bytes() -> None:
    config, mesh = CONFIGS["sparse"], Mesh(2, 2)
    half = TokenTraffic.of(config, mesh, value_bytes=2)
    assert TokenTraffic.of(config, mesh).decoded(config) == 2 * half.decoded(config)
    assert TokenTraffic.of(config, Mesh()).decoded(config) == 0
