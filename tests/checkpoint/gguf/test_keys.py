"""Configuration to keys and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qnext.checkpoint.gguf.container import BLOCK_TYPES, GgufFile, GgufTensor, Value
from qnext.checkpoint.gguf.keys import config_from_keys, config_to_keys
from qnext.checkpoint.gguf.names import gguf_entries
from qnext.config import ModelConfig, preset
from qnext.errors import ConfigError, UsageError

from .files import GGUF_CONFIGS


def file_of(config: ModelConfig, **changes: Value | None) -> GgufFile:
    """What a file of this configuration says; `changes` by key with `__` for a dot, None removes."""
    keys = config_to_keys(config) | {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {e.name: GgufTensor(e.name, BLOCK_TYPES["F32"], e.shape, 0, 1) for e in gguf_entries(config)}
    return GgufFile(Path("m.gguf"), {name: value for name, value in keys.items() if value is not None}, tensors)


@pytest.mark.parametrize("name", GGUF_CONFIGS)
def test_round_trip(name: str) -> None:
    config = GGUF_CONFIGS[name]
    assert config_from_keys(file_of(config)) == config


@pytest.mark.parametrize("name", ["80b-a3b", "qwen3-32b", "qwen3-30b-a3b", "nano-5m"])
def test_round_trip_of_presets(name: str) -> None:
    assert config_from_keys(file_of(preset(name))) == preset(name)


def test_irregular_layers() -> None:
    config = GGUF_CONFIGS["next"]
    kinds = config.layer_types
    config = replace(config, layer_types=(kinds[-1], *kinds[:-1]))
    assert "qwen3next.full_attention_interval" not in config_to_keys(config)
    assert config_from_keys(file_of(config)) == config


def test_files_without_the_list_of_recurrent_layers() -> None:
    config = GGUF_CONFIGS["next"]
    assert config_from_keys(file_of(config, qwen3next__attention__recurrent_layers=None)) == config


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "attention_bias": ("dense", {"attention_bias": True}),
    "decoder_sparse_step": ("moe", {"decoder_sparse_step": 2}),
    "mlp_only_layers": ("next", {"mlp_only_layers": (1,)}),
    "norm_topk_prob": ("moe", {"norm_topk_prob": False}),
    "linear_value_head_dim": ("next", {"linear_value_head_dim": 4}),
    "attention_output_gate": ("next", {"attention_output_gate": False}),
    "zero_centered_norm": ("next", {"zero_centered_norm": False}),
    "shared_expert_intermediate_size": ("next", {"shared_expert_intermediate_size": 0}),
    "partial_rotary_factor": ("dense", {"partial_rotary_factor": 0.5}),
    "num_nextn_predict_layers": ("dense", {"num_nextn_predict_layers": 1}),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_llama_cpp_cannot_compute_is_refused(field: str) -> None:
    name, changes = UNSUPPORTED[field]
    with pytest.raises(UsageError, match=field):
        config_to_keys(replace(GGUF_CONFIGS[name], **changes))


def test_yarn_that_llama_cpp_cannot_compute() -> None:
    config = GGUF_CONFIGS["next yarn"]
    assert config.rope_scaling is not None
    for changes in ({"attention_factor": 1.5}, {"truncate": False}):
        scaling = replace(config.rope_scaling, **changes)
        with pytest.raises(UsageError, match=f"rope_scaling.{next(iter(changes))}"):
            config_to_keys(replace(config, rope_scaling=scaling))


WRONG: dict[str, tuple[dict[str, Value | None], str]] = {
    "architecture": ({"general__architecture": "llama"}, "general.architecture: 'llama' is not supported"),
    "no architecture": ({"general__architecture": None}, "general.architecture: 'None' is not supported"),
    "missing": ({"qwen3next__embedding_length": None}, "key qwen3next.embedding_length: missing"),
    "type": ({"qwen3next__embedding_length": "64"}, "key qwen3next.embedding_length: must be a number of things"),
    "list": ({"qwen3next__attention__head_count": [4, 4]}, "attention.head_count: must be a number of things"),
    "negative": ({"qwen3next__block_count": -1}, "block_count: must be a number of things, not -1"),
    "layers": ({"qwen3next__block_count": 2**40}, "block_count: 1099511627776 with 1 layers"),
    "only MTP": ({"qwen3next__block_count": 1}, "block_count: 1 with 1 layers"),
    "experts": ({"qwen3next__expert_count": 2**40}, "expert_count: more than"),
    "recurrent": ({"qwen3next__attention__recurrent_layers": [True]}, "recurrent_layers: must hold 5 truth values"),
    "recurrent MTP": ({"qwen3next__attention__recurrent_layers": [True] * 5}, "must hold 5 truth values"),
    "interval": (
        {"qwen3next__attention__recurrent_layers": None, "qwen3next__full_attention_interval": 0}, "must be at least 1"
    ),
    "value length": ({"qwen3next__attention__value_length": 1}, "value_length: differs"),
    "no head": ({"qwen3next__attention__key_length": 0, "qwen3next__attention__value_length": 0}, "must be positive"),
    "rotary": ({"qwen3next__rope__dimension_count": 99}, "partial_rotary_factor"),
    "inner": ({"qwen3next__ssm__inner_size": 1}, "ssm.inner_size: must be state_size"),
    "base": ({"qwen3next__rope__freq_base": float("nan")}, "rope.freq_base: must be a finite number"),
    "unknown": ({"qwen3next__logit_scale": 2.0}, "key qwen3next.logit_scale: unknown"),
    "gating": ({"qwen3next__expert_gating_func": 2}, "expert_gating_func: 2 is not supported, only 1"),
    "scaling": ({"qwen3next__rope__scaling__type": "longrope"}, "'longrope' is not supported"),
    "half a scaling": ({"qwen3next__rope__scaling__type": "yarn"}, "rope.scaling.factor: missing"),
    "end token": ({"tokenizer__ggml__eos_token_id": 10**6}, "m.gguf: eos_token_id"),
    "end tokens": ({"qnext__eos_token_ids": [1, 2]}, "contradicts tokenizer.ggml.eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_refused_by_name(name: str) -> None:
    changes, message = WRONG[name]
    config = replace(GGUF_CONFIGS["next"], eos_token_id=3) if name == "end token" else GGUF_CONFIGS["next"]
    if name == "end token":
        changes = changes | {"qnext__eos_token_ids": None}
    with pytest.raises(ConfigError, match=r"m\.gguf: ") as caught:
        config_from_keys(file_of(config, **changes))
    assert message in str(caught.value)
