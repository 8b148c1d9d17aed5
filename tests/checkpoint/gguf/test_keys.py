"""Configuration to keys and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qnext.checkpoint.gguf.block_types import BLOCK_TYPES
from qnext.checkpoint.gguf.container import GgufFile, GgufTensor, Value
from qnext.checkpoint.gguf.keys import config_to_keys
from qnext.checkpoint.gguf.names import architecture, gguf_entries
from qnext.checkpoint.gguf.read_keys import NEUTRAL_VALUES, WITHOUT_EFFECT, config_from_keys
from qnext.config import ModelConfig, hybrid_pattern, preset
from qnext.errors import ConfigError, NotSupported, QnextWarning, UsageError

from .files import GGUF_CONFIGS


def file_of(config: ModelConfig, **changes: Value | None) -> GgufFile:
    """What a file of this configuration says; `changes` by key with `__` for a dot, None removes."""
    keys = config_to_keys(config) | {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {
        e.name: GgufTensor(e.name, BLOCK_TYPES["F32"], e.shape, 0, 1, Path("m.gguf")) for e in gguf_entries(config)
    }
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


def arch_keys(name: str, changes: dict[str, Value | None]) -> dict[str, Value | None]:
    return {f"{architecture(GGUF_CONFIGS[name])}.{key}": value for key, value in changes.items()}


# what is left out -> (model, fields that llama.cpp's reader, or a look at the tensors, fills in)
ABSENT: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "list and interval": ("next", ("attention.recurrent_layers", "full_attention_interval"), {}),
    "base": ("dense", ("rope.freq_base",), {"rope_theta": 10_000.0}),
    "key heads": ("moe", ("attention.head_count_kv",), {"num_key_value_heads": 4}),
    "value length": ("dense", ("attention.value_length",), {}),
    "head": ("dense", ("attention.key_length", "attention.value_length"), {"head_dim": 16, "num_attention_heads": 4}),
    "rotary": ("next", ("rope.dimension_count",), {"partial_rotary_factor": 1.0}),
    "expert": ("moe", ("expert_feed_forward_length",), {"intermediate_size": 64, "moe_intermediate_size": 32}),
    "shared": (
        "next",
        ("expert_shared_feed_forward_length",),
        {"shared_expert_intermediate_size": 64, "intermediate_size": 64},
    ),
    "neurons": ("moe", ("feed_forward_length",), {"intermediate_size": 0}),
    "inner": ("next", ("ssm.inner_size",), {}),
    "MTP": ("next", ("nextn_predict_layers",), {}),
    "no scaling": ("next", ("rope.scaling.type",), {}),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_key_means_what_the_reference_takes(name: str) -> None:
    model, keys, fields = ABSENT[name]
    config = replace(GGUF_CONFIGS[model], **fields)
    assert config_from_keys(file_of(config, **arch_keys(model, dict.fromkeys(keys)))) == config


def test_tensors_say_which_layers_are_linear() -> None:
    """Where neither the list nor the interval does: here every third, which no default would give."""
    base = GGUF_CONFIGS["next"].with_layers(6)
    config = replace(base, layer_types=hybrid_pattern(6, interval=3))
    absent = dict.fromkeys(("attention.recurrent_layers", "full_attention_interval"))
    assert config_from_keys(file_of(config, **arch_keys("next", absent))) == config


def test_the_first_converters_counted_every_fourth() -> None:
    """src/models/qwen3next.cpp: 4 without full_attention_interval; also where no tensor says otherwise."""
    file = file_of(GGUF_CONFIGS["next"], **arch_keys("next", {"attention.recurrent_layers": None}))
    del file.keys["qwen3next.full_attention_interval"], file.tensors["blk.1.ssm_out.weight"]
    assert config_from_keys(file).layer_types == hybrid_pattern(4, interval=4)


def test_yarn_from_the_length_that_was_trained() -> None:
    config = GGUF_CONFIGS["next yarn"]
    assert config.rope_scaling is not None
    file = file_of(config, **arch_keys("next", {"rope.scaling.original_context_length": None}))
    scaling = replace(config.rope_scaling, original_max_position_embeddings=config.max_position_embeddings)
    assert config_from_keys(file) == replace(config, rope_scaling=scaling)


@pytest.mark.parametrize("factor", [None, 0.0, 1.0, 1])
@pytest.mark.parametrize("kind", ["none", "linear", "yarn", None])
def test_a_scaling_by_one_is_none(kind: str | None, factor: float | None) -> None:
    changes: dict[str, Value | None] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    assert config_from_keys(file_of(GGUF_CONFIGS["next"], **arch_keys("next", changes))) == GGUF_CONFIGS["next"]


FORMS: dict[str, dict[str, Value | None]] = {
    "number of things as a fraction": {"expert_used_count": float(GGUF_CONFIGS["next"].num_experts_per_tok)},
    "fraction as a number of things": {"rope.freq_base": int(GGUF_CONFIGS["next"].rope_theta)},
    "a value for every layer": {"expert_feed_forward_length": [GGUF_CONFIGS["next"].moe_intermediate_size] * 5},
    "zero for layers without it": {"attention.head_count_kv": [0, 0, 0, GGUF_CONFIGS["next"].num_key_value_heads, 0]},
    "ones and zeros as truth": {"attention.recurrent_layers": [1, 1, 1, 0, 0]},
    "without the layers that are not counted": {"attention.recurrent_layers": [True, True, True, False]},
    "precise number": {"attention.layer_norm_rms_epsilon": 1e-06},
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_the_same_value(name: str) -> None:
    config = replace(GGUF_CONFIGS["next"], rms_norm_eps=1e-6)
    assert config_from_keys(file_of(config, **arch_keys("next", FORMS[name]))) == config


@pytest.mark.parametrize("key", NEUTRAL_VALUES)
def test_a_value_that_says_what_is_computed_anyway(key: str, warned: Callable[[], list[str]]) -> None:
    config = GGUF_CONFIGS["next"]
    for value in NEUTRAL_VALUES[key]:
        assert config_from_keys(file_of(config, **arch_keys("next", {key: value}))) == config
    with pytest.raises(NotSupported, match=rf"m\.gguf: key qwen3next\.{key}: .* is not supported, only"):
        config_from_keys(file_of(config, **arch_keys("next", {key: 2.5})))
    assert not warned()


def test_scales_that_are_computed_anyway() -> None:
    config = GGUF_CONFIGS["dense"]
    assert config_from_keys(file_of(config, qwen3__attention__scale=config.head_dim**-0.5)) == config
    assert config_from_keys(file_of(config, qwen3__embedding_length_out=config.hidden_size)) == config
    for changes in ({"attention.scale": 0.1}, {"embedding_length_out": 3}):
        with pytest.raises(NotSupported, match=next(iter(changes))):
            config_from_keys(file_of(config, **arch_keys("dense", changes)))


def test_unknown_keys_are_named_once(warned: Callable[[], list[str]]) -> None:
    config = GGUF_CONFIGS["moe"]
    others: dict[str, Value | None] = {f"general.{i}": "x" for i in range(3)} | {"quantize.imatrix.file": "a.dat"}
    silent = arch_keys("moe", dict.fromkeys(WITHOUT_EFFECT, 3)) | others | {"general.file_type": 15}
    assert config_from_keys(file_of(config, **silent)) == config
    assert not warned()
    assert config_from_keys(file_of(config, **arch_keys("moe", {"news": 1, "older": [True]}))) == config
    assert warned() == ["m.gguf: unknown keys are ignored: qwen3moe.news, qwen3moe.older"]


@pytest.mark.parametrize("value", [10**6, -7, "end", 2.5])
def test_a_token_that_is_none_is_passed_over(value: Value) -> None:
    changes = {"tokenizer__ggml__eos_token_id": value, "qnext__eos_token_ids": None}
    with pytest.warns(QnextWarning, match=r"key tokenizer\.ggml\.eos_token_id: .* is no token"):
        config = config_from_keys(file_of(GGUF_CONFIGS["next"], **changes))
    assert config == replace(GGUF_CONFIGS["next"], eos_token_id=None)


def test_minus_one_is_how_some_tools_write_no_token(warned: Callable[[], list[str]]) -> None:
    assert config_from_keys(file_of(GGUF_CONFIGS["next"], tokenizer__ggml__bos_token_id=-1)).bos_token_id is None
    assert not warned()


MTP_FILES: dict[str, tuple[dict[str, Value | None], str, bool]] = {
    # changes of keys, tensors that are taken away, whether the trunk's layers are all that is counted
    "announced, counted and not there": ({}, r"blk\.4\..*", False),
    "announced, not counted and not there": ({"block_count": 4}, r"blk\.4\..*", False),
    "without its last norm": ({}, r"blk\.4\.nextn\.shared_head_norm.*", False),
    "there and not announced": ({"nextn_predict_layers": None}, "", True),
    "there, not announced and not counted": ({"nextn_predict_layers": None, "block_count": 4}, "", True),
}


@pytest.mark.parametrize("name", MTP_FILES)
def test_multi_token_prediction_is_where_its_tensors_are(name: str, warned: Callable[[], list[str]]) -> None:
    changes, gone, is_there = MTP_FILES[name]
    file = file_of(GGUF_CONFIGS["next"], **arch_keys("next", changes))
    for tensor in [tensor for tensor in file.tensors if re.fullmatch(gone, tensor)]:
        del file.tensors[tensor]
    expected = replace(GGUF_CONFIGS["next"], num_nextn_predict_layers=int(is_there))
    assert config_from_keys(file) == expected
    messages = warned()
    assert messages == ([] if is_there else [messages[0]])
    assert is_there or "multi-token prediction is declared but incomplete" in messages[0]


OTHERS: dict[str, tuple[dict[str, Value | None], str]] = {
    "LoRA": ({"general__type": "adapter"}, r"m\.gguf: a LoRA adapter \(adapter\), no model"),
    "projector": ({"general__type": "mmproj", "general__architecture": "clip"}, "a projector of images or sound"),
    "old projector": ({"general__type": None, "general__architecture": "clip"}, "a projector of images or sound"),
    "matrix": ({"general__type": "imatrix", "general__architecture": None}, "an importance matrix"),
    "control": ({"general__type": None, "general__architecture": "controlvector"}, "a control vector"),
    "other model": ({"general__architecture": "qwen35moe"}, "'qwen35moe' is not supported; known: qwen3next"),
    "older model": ({"general__architecture": "llama"}, "known: qwen3next (Qwen3-Next, Qwen3-Coder-Next), qwen3moe"),
    "no architecture": ({"general__architecture": None}, "general.architecture: 'None' is not supported"),
    "value length": ({"qwen3next__attention__value_length": 1}, "value_length: differs"),
    "inner": ({"qwen3next__ssm__inner_size": 1}, "ssm.inner_size: must be state_size"),
    "kinds of heads": ({"qwen3next__attention__head_count": [4, 8]}, "head_count: 2 different values for the layers"),
    "pooling": ({"qwen3next__pooling_type": 3}, "key qwen3next.pooling_type: 3 is not supported, only 0"),
    "gating": ({"qwen3next__expert_gating_func": 2}, "expert_gating_func: 2 is not supported, only 0 or 1"),
    "scaling": ({"qwen3next__rope__scaling__type": "longrope"}, "'longrope' is not supported"),
    "stretched": ({"qwen3next__rope__scaling__factor": 2.0}, "rope.scaling.type: 'linear' is not supported"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_supported_is_not_called_damage(name: str) -> None:
    changes, message = OTHERS[name]
    with pytest.raises(NotSupported, match=r"m\.gguf: ") as caught:
        config_from_keys(file_of(GGUF_CONFIGS["next"], **changes))
    assert re.search(message, str(caught.value)) or message in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "a vocabulary without a model"),
        (("blk.4.nextn.eh_proj.weight", "blk.4.attn_norm.weight"), "multi-token prediction without its model"),
        (("token_embd.weight", "blk.0.attn_norm.weight", "cls.output.weight"), "a classifier or reranker"),
    ],
)
def test_companions_of_models(names: tuple[str, ...], message: str) -> None:
    file = file_of(GGUF_CONFIGS["next"])
    tensors = {name: next(iter(file.tensors.values())) for name in names}
    with pytest.raises(NotSupported, match=message):
        config_from_keys(file._replace(tensors=tensors))


WRONG: dict[str, tuple[dict[str, Value | None], str]] = {
    "missing": ({"qwen3next__embedding_length": None}, "key qwen3next.embedding_length: missing"),
    "type": (
        {"qwen3next__embedding_length": "64"},
        "key qwen3next.embedding_length: must be a whole number, at least 0",
    ),
    "part": (
        {"qwen3next__embedding_length": 64.5},
        "key qwen3next.embedding_length: must be a whole number, at least 0",
    ),
    "negative": ({"qwen3next__block_count": -1}, "block_count: must be a whole number, at least 0, not -1"),
    "layers": ({"qwen3next__block_count": 2**40}, "block_count: 1099511627776 layers"),
    "no layers": ({"qwen3next__block_count": 0}, "block_count: 0 layers"),
    "experts": ({"qwen3next__expert_count": 2**40}, "expert_count: more than"),
    "recurrent": ({"qwen3next__attention__recurrent_layers": [True]}, "recurrent_layers: must hold 4 truth values"),
    "recurrent MTP": ({"qwen3next__attention__recurrent_layers": [True] * 5}, "must hold 4 truth values"),
    "recurrent number": ({"qwen3next__attention__recurrent_layers": [1, 1, 1, 2]}, "must hold 4 truth values"),
    "interval": (
        {"qwen3next__attention__recurrent_layers": None, "qwen3next__full_attention_interval": 0},
        "must be at least 1",
    ),
    "no head": ({"qwen3next__attention__key_length": 0, "qwen3next__attention__value_length": 0}, "must be positive"),
    "rotary": ({"qwen3next__rope__dimension_count": 99}, "partial_rotary_factor"),
    "base": ({"qwen3next__rope__freq_base": float("nan")}, "rope.freq_base: must be a finite number"),
    "tokens": ({"tokenizer__ggml__tokens": ["a"] * 999}, "tokenizer.ggml.tokens: 999 tokens, token_embd.weight has"),
    "end tokens": ({"qnext__eos_token_ids": [1, 2]}, "contradicts tokenizer.ggml.eos_token_id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_refused_by_name(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=r"m\.gguf: ") as caught:
        config_from_keys(file_of(GGUF_CONFIGS["next"], **changes))
    assert message in str(caught.value)
