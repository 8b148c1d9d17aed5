"""A folder of random weights that never was a model in memory equals one that was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qnext.checkpoint import create_folder, load_model
from qnext.errors import UsageError
from qnext.model import CausalLM, initialize

from .folders import CONFIGS
from .test_load import assert_same_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["next", "next tied", "moe", "dense"])
def test_streamed_equals_initialised(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    create_folder(CONFIGS[name], tmp_path / "m", seed=5, dtype=dtype, max_shard_bytes=40_000)
    model = CausalLM(CONFIGS[name]).to(dtype)
    initialize(model, seed=5)
    assert_same_weights(load_model(tmp_path / "m"), model)


def test_seed_decides(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        create_folder(CONFIGS["next"], tmp_path / folder, seed=seed)
    a, b, c = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc")
    assert a == b != c


def test_no_two_tensors_are_alike(tmp_path: Path) -> None:
    """A shared random stream would repeat itself from expert to expert and layer to layer."""
    create_folder(CONFIGS["next"], tmp_path / "m", seed=1, dtype=torch.float32)
    model = load_model(tmp_path / "m")
    starts = [
        tuple(part.reshape(-1)[:8].tolist())
        for name, parameter in model.named_parameters()
        if "norm" not in name and parameter.numel() > 8
        for part in (parameter if parameter.dim() == 3 and "experts" in name else [parameter])
    ]
    assert len(starts) == len(set(starts)) > 60


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    with pytest.raises(UsageError, match="not empty"):
        create_folder(CONFIGS["next"], tmp_path / "m", seed=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "config.json"]
