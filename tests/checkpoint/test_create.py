"""A folder of random weights that never was a model in memory equals one that was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qnext.checkpoint import create_folder, load_model
from qnext.checkpoint.quantize import quantize_folder
from qnext.config import ModelConfig
from qnext.errors import DoesNotFit, UsageError
from qnext.model import CausalLM, initialize
from qnext.quant.scheme import make_policy
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.provenance import content_of

from .folders import CONFIGS
from .quantized import DENSE, NEXT
from .test_load import assert_same_weights

WIDE = replace(NEXT, hidden_size=128)


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


VARIANTS = {
    "next": NEXT,
    "next tied": replace(NEXT, tie_word_embeddings=True),
    "next without drafts": replace(NEXT, num_nextn_predict_layers=0),
    "next without a shared expert": replace(NEXT, shared_expert_intermediate_size=0),
    "next with a dense layer": replace(NEXT, mlp_only_layers=(1,), intermediate_size=64),
    "wide": WIDE,
    "dense": DENSE,
    "dense tied": replace(DENSE, tie_word_embeddings=True),
}
CASES = [("wide", "int4-g128"), ("next", "int8"), ("next", "int8-g64"), *((name, "int4-g32") for name in VARIANTS)]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_made_in_a_scheme_equals_made_and_quantised(tmp_path: Path, name: str, scheme: str) -> None:
    config = VARIANTS[name]
    assert_made_equals_quantised(tmp_path, config, scheme, torch.bfloat16)


def test_from_fp32(tmp_path: Path) -> None:
    assert_made_equals_quantised(tmp_path, NEXT, "int4-g32", torch.float32)


def assert_made_equals_quantised(root: Path, config: ModelConfig, scheme: str, dtype: torch.dtype) -> None:
    """Every file, byte for byte."""
    save_tokenizer(byte_level_tokenizer(), root / "t", model_max_length=128, chat_template="x")
    policy = make_policy(scheme, head=None, is_tied=config.tie_word_embeddings)
    create_folder(config, root / "plain", seed=5, dtype=dtype, tokenizer_folder=root / "t")
    quantize_folder(root / "plain", root / "quantised", policy=policy, max_shard_bytes=100_000)
    options = {"dtype": dtype, "tokenizer_folder": root / "t", "max_shard_bytes": 100_000}
    create_folder(config, root / "made", seed=5, policy=policy, **options)
    made = content_of(root / "made")
    assert made == content_of(root / "quantised") and len(made) > 5
    load_model(root / "made")


def test_a_scheme_that_nothing_fits_and_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="whole groups of 128"):
        create_folder(NEXT, tmp_path / "m", seed=1, policy=make_policy("int4-g128", head="keep", is_tied=False))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFit, match="GiB"):
        create_folder(NEXT, tmp_path / "m", seed=1)
    assert not list(tmp_path.iterdir())
