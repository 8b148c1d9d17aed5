"""A rank reads its part of the files and nothing else, in every form of the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.quantize import quantize_folder
from qnext.errors import NotSupported
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.shard import RankShard
from qnext.planning import list_parameters
from qnext.quant.scheme import make_policy
from tests.checkpoint.folders import make_fp8
from tests.checkpoint.packed_folders import FORMS, PackedForm, packed_folder
from tests.model.models import make_model, random_tokens
from tests.parallel.ranks import MemoryLink
from tests.parallel.test_forward import CONFIGS, rows, rows_on_ranks


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_reads_its_own_bytes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    save_model(make_model(config, dtype=torch.bfloat16), tmp_path / "m")
    shard = RankShard.of(config, Mesh(2, 2 if config.num_experts else 1, 1))
    own = 2 * sum(shard.num_values(info) for info in list_parameters(config).values())
    read: list[int] = []
    preadv = os.preadv

    def counting(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    load_model(tmp_path / "m", on_rank=OnRank(shard, MemoryLink(shard.mesh, None)))  # type: ignore[arg-type]
    assert sum(read) == own
    whole = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    assert own < 0.55 * whole


@pytest.mark.parametrize(
    ("name", "scheme", "with_records"),
    [("sparse", "int4-g32", False), ("sparse", "int8", False), ("sparse", "int4-g32", True), ("dense", "int8", False)],
)
def test_codes_on_ranks(tmp_path: Path, name: str, scheme: str, with_records: bool) -> None:
    config = CONFIGS[name]
    save_model(make_model(config), tmp_path / "m")
    policy = make_policy(scheme, head=None, is_tied=config.tie_word_embeddings)
    quantize_folder(tmp_path / "m", tmp_path / "q", policy=policy, with_records=with_records)
    tokens_T = random_tokens(config, 23)
    alone = rows(load_model(tmp_path / "q"), tokens_T)
    for tensor, expert in [(2, 1), (2, 2)] if config.num_experts else [(2, 1), (4, 1)]:
        for found in rows_on_ranks(tmp_path / "q", config, tensor, expert, tokens_T):
            for mine, theirs in zip(found, alone, strict=True):
                assert torch.equal(mine, theirs)


def test_fp8_on_ranks(tmp_path: Path) -> None:
    """Where ranks are cut between blocks that share a scale; a cut through one is refused by name."""
    wide = {"hidden_size": 256, "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    config = CONFIGS["sparse"].with_(**wide, num_key_value_heads=4)
    save_model(make_model(config, dtype=torch.bfloat16), tmp_path / "m")
    make_fp8(tmp_path / "m")
    tokens_T = random_tokens(config, 23)
    alone = rows(load_model(tmp_path / "m"), tokens_T)
    for found in rows_on_ranks(tmp_path / "m", config, 2, 2, tokens_T):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))
    with pytest.raises(NotSupported, match=r"tensor \S+: one number belongs to several rows, and ranks would cut"):
        rows_on_ranks(tmp_path / "m", config, 4, 1, tokens_T)


@pytest.mark.parametrize("form", FORMS[:12:3], ids=str)
def test_packed_forms_on_ranks(tmp_path: Path, form: PackedForm) -> None:
    """Forms whose rows lie together are read; those that mix rows are refused by name, and read where none is cut.
    Of these small sizes the kernels take some, and not the same ones on every rank: logits are 0.5 and more, and
    differ by 0.0015. (With PyTorch alone, QNEXT_BACKEND=torch, no bit differs.)"""
    packed_folder(tmp_path / "m", form, dtype=torch.float32)
    config = read_layout(tmp_path / "m").config
    tokens_T = random_tokens(config, 9)
    alone = rows(load_model(tmp_path / "m"), tokens_T)
    meshes = [(1, 2), (2, 1)]
    if form.layout in ("awq", "gptq", "gptq_v2"):
        with pytest.raises(NotSupported, match=r"tensor \S+: ranks read rows apart, which .* does not allow"):
            rows_on_ranks(tmp_path / "m", config, 2, 1, tokens_T)
        meshes.pop()
    for tensor, expert in meshes:
        for found in rows_on_ranks(tmp_path / "m", config, tensor, expert, tokens_T):
            torch.testing.assert_close(found, alone, rtol=0, atol=5e-3)
