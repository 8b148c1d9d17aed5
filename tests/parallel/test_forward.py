"""A model on ranks computes what it computes alone: the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model, save_model
from qnext.config import ModelConfig
from qnext.model import Batch, CausalLM
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.shard import RankShard
from tests.model.models import make_model, next_config, plain_config, random_tokens
from tests.parallel.ranks import MemoryLink, on_all_ranks

NATIVE = {
    "hidden_size": 64,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 8,
}
DENSE = {"num_experts": 0, "num_experts_per_tok": 0}
CONFIGS = {
    "sparse": next_config(**NATIVE, num_nextn_predict_layers=1),
    "dense": next_config(**NATIVE, **DENSE, num_nextn_predict_layers=1),
    "dense, tied, bias": plain_config(
        hidden_size=64,
        head_dim=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        attention_bias=True,
        intermediate_size=96,
    ),
    "dense layers between": next_config(**NATIVE, mlp_only_layers=(1,)),
}
MESHES = [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]


@torch.no_grad()
def rows(model: CausalLM, tokens_T: Tensor) -> list[Tensor]:
    """Logits of the trunk, and of the MTP layer where there is one."""
    batch = Batch.from_lengths(tokens_T, [len(tokens_T) - 5, 5])
    trunk = model(batch)
    found = [model.logits(trunk.hidden_TD)]
    if model.mtp is not None:
        found.append(model.logits(model.draft_hidden(tokens_T.roll(-1), trunk, batch)))
    return found


def rows_on_ranks(folder: Path, config: ModelConfig, tensor: int, expert: int, tokens_T: Tensor) -> list[list[Tensor]]:
    def run(mesh: Mesh, link: MemoryLink) -> list[Tensor]:
        return rows(load_model(folder, on_rank=OnRank(RankShard.of(config, mesh), link)), tokens_T)

    return on_all_ranks(tensor, expert, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tensor", "expert"), MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_compute_what_one_process_computes(
    tmp_path: Path, name: str, tensor: int, expert: int, dtype: torch.dtype
) -> None:
    config = CONFIGS[name]
    if expert > 1 and not config.num_experts:
        pytest.skip("has no experts")
    save_model(make_model(config, dtype=dtype), tmp_path / "m")
    tokens_T = random_tokens(config, 23)
    alone = rows(load_model(tmp_path / "m"), tokens_T)
    for found in rows_on_ranks(tmp_path / "m", config, tensor, expert, tokens_T):
        for mine, theirs in zip(found, alone, strict=True):
            assert torch.equal(mine, theirs)
