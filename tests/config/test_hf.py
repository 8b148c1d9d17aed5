"""config.json: what is read, what is written, what is refused and in which words."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.config import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    PRESETS,
    ModelConfig,
    YarnScaling,
    from_hf,
    preset,
    to_hf,
)
from qnext.config.hf import hf_model_type
from qnext.errors import ConfigError, ModelNotFound, NotSupported, QnextWarning
from tests.config.folder import read_config
from tests.config.references import YARN, released_80b, without


def test_the_released_file_is_the_preset() -> None:
    assert from_hf(released_80b(), has_mtp=True) == preset("80b-a3b")
    assert from_hf(released_80b(), has_mtp=False) == preset("80b-a3b").with_(num_nextn_predict_layers=0)


def test_layer_types_say_the_same_as_the_interval() -> None:
    values = without(released_80b(), "full_attention_interval")
    values["layer_types"] = (["linear_attention"] * 3 + ["full_attention"]) * 12
    assert from_hf(values, has_mtp=True) == preset("80b-a3b")


def test_nested_rope_parameters_say_the_same_as_flat_keys() -> None:
    values = without(released_80b(), "rope_theta", "partial_rotary_factor", "rope_scaling")
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}
    assert from_hf(values, has_mtp=True) == preset("80b-a3b")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_is_read_from_both_places(key: str) -> None:
    config = from_hf({**released_80b(), key: YARN}, has_mtp=True)
    assert config.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=262144)


def test_the_old_name_type_is_read() -> None:
    scaling = {"type": "yarn", **without(YARN, "rope_type")}
    assert from_hf({**released_80b(), "rope_scaling": scaling}).rope_scaling is not None


def test_a_declared_mtp_count_wins_over_what_the_checkpoint_holds() -> None:
    assert from_hf({**released_80b(), "num_nextn_predict_layers": 0}, has_mtp=True).num_nextn_predict_layers == 0
    assert from_hf({**released_80b(), "mtp_num_hidden_layers": 1}).num_nextn_predict_layers == 1


def moe_values() -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": 48,
    }


def test_num_local_experts_is_another_name() -> None:
    values = {**without(moe_values(), "num_experts"), "num_local_experts": 8}
    assert from_hf(values) == from_hf(moe_values())
    assert from_hf({**moe_values(), "num_local_experts": 8}) == from_hf(moe_values())
    with pytest.raises(ConfigError, match="num_local_experts: contradicts"):
        from_hf({**moe_values(), "num_local_experts": 9})


def test_qwen3_families_have_plain_norms_and_no_gate() -> None:
    config = from_hf(moe_values())
    assert not config.zero_centered_norm
    assert not config.attention_output_gate
    assert config.partial_rotary_factor == 1.0
    assert config.layer_types == (FULL_ATTENTION,) * 2


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "2048"}, "hidden_size"),
    ({"hidden_size": 2048.5}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"head_dim": 10**400}, "head_dim"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"rope_theta": math.inf}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"rope_theta": 1.0}, "rope_theta"),
    ({"num_experts": 0}, "num_experts"),
    ({"num_experts": -4}, "num_experts"),
    ({"num_local_experts": 4}, "num_local_experts"),
    ({"num_experts_per_tok": 513}, "num_experts_per_tok"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
    ({"num_key_value_heads": 3}, "num_attention_heads"),
    ({"linear_num_value_heads": 17}, "linear_num_value_heads"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim"),
    ({"layer_types": ["full_attention"] * 47}, "layer_types"),
    ({"layer_types": ["full_attention"] * 48}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"full_attention_interval": 0}, "full_attention_interval"),
    ({"full_attention_interval": None, "layer_types": ["no_attention"] * 48}, "layer_types"),
    ({"full_attention_interval": None, "layer_types": [["full_attention"]] * 48}, "layer_types"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"mlp_only_layers": [48]}, "mlp_only_layers"),
    ({"mlp_only_layers": 3}, "mlp_only_layers"),
    ({"mlp_only_layers": [True]}, "mlp_only_layers"),
    ({"mlp_only_layers": [0], "intermediate_size": 0}, "intermediate_size"),
    ({"intermediate_size": -1}, "intermediate_size"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ({"initializer_range": -0.02}, "initializer_range"),
    ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef"),
    ({"partial_rotary_factor": 0.255}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "yarn", "type": "linear"}}, "rope_type"),
    ({"rope_scaling": without(YARN, "factor")}, "rope_scaling.factor"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor"),
    ({"rope_scaling": {**YARN, "factor": True}}, "rope_scaling.factor"),
    ({"rope_scaling": {**YARN, "factor": 10**400}}, "rope_scaling.factor"),
    ({"rope_scaling": {**YARN, "truncate": 1.5}}, "rope_scaling.truncate"),
    ({"rope_scaling": {**YARN, "beta_slow": 0}}, "rope_scaling.beta_slow"),
    ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "rope_scaling.beta_fast"),
    ({"rope_scaling": {**YARN, "attention_factor": 0.0}}, "rope_scaling.attention_factor"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 8.5}}, "original_max_position_embeddings"),
    ({"rope_scaling": YARN, "original_max_position_embeddings": 8192}, "original_max_position_embeddings"),
    ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "rope_parameters.factor"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ({"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 0}, "mtp_num_hidden_layers"),
    ({"eos_token_id": [None]}, "eos_token_id"),
    ({"eos_token_id": -2}, "eos_token_id"),
    ({"bos_token_id": [151643]}, "bos_token_id"),
    ({"model_type": None, "architectures": None}, "model_type"),
    ({"model_type": ["qwen3_next"]}, "model_type"),
    ({"architectures": 3}, "architectures"),
]


@pytest.mark.parametrize(("changes", "key"), CONTRADICTIONS)
def test_a_contradiction_names_file_and_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf({**released_80b(), **changes}, file="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"model_type": "qwen3_next", "model_type": "qwen3"}', "model_type"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_missing_file_is_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_survives_the_disk(tmp_path: Path, name: str) -> None:
    for config in (preset(name), preset(name).with_yarn(2.0)):
        (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
        assert read_config(tmp_path) == config


def test_presets_are_written_as_the_family_that_computes_them() -> None:
    kinds = {name: hf_model_type(preset(name)) for name in PRESETS}
    assert kinds["80b-a3b"] == kinds["nano-5m"] == "qwen3_next"
    assert kinds["qwen3-32b"] == "qwen3"
    assert kinds["qwen3-30b-a3b"] == kinds["qwen3-235b-a22b"] == "qwen3_moe"


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any valid model whose unused fields are left alone."""
    layer_types = tuple(draw(st.lists(st.sampled_from([LINEAR_ATTENTION, FULL_ATTENTION]), min_size=1, max_size=6)))
    kv_heads = draw(st.integers(1, 3))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 999)),
        "hidden_size": draw(st.integers(1, 99)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 8 * draw(st.integers(1, 4)),
        "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "rope_theta": draw(st.floats(2.0, 1e8)),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-3)),
        "intermediate_size": draw(st.integers(1, 99)),
        "eos_token_id": draw(st.one_of(st.none(), st.just(0), st.just((0,)))),
    }
    for name in ("attention_bias", "attention_output_gate", "zero_centered_norm", "tie_word_embeddings"):
        fields[name] = draw(st.booleans())
    fields["num_nextn_predict_layers"] = draw(st.integers(0, 1))
    if fields["num_nextn_predict_layers"]:
        fields["mtp_uses_final_norm"] = draw(st.booleans())
    if LINEAR_ATTENTION in layer_types:
        key_heads = draw(st.integers(1, 3))
        fields.update(
            linear_num_key_heads=key_heads,
            linear_num_value_heads=key_heads * draw(st.integers(1, 3)),
            linear_key_head_dim=draw(st.integers(1, 9)),
            linear_value_head_dim=draw(st.integers(1, 9)),
            linear_conv_kernel_dim=draw(st.integers(1, 5)),
        )
    if draw(st.booleans()):
        num_experts = draw(st.integers(1, 9))
        fields.update(
            num_experts=num_experts,
            num_experts_per_tok=draw(st.integers(1, num_experts)),
            moe_intermediate_size=draw(st.integers(1, 9)),
            shared_expert_intermediate_size=draw(st.integers(0, 9)),
            norm_topk_prob=draw(st.booleans()),
            decoder_sparse_step=draw(st.integers(1, 3)),
            mlp_only_layers=tuple(draw(st.sets(st.integers(0, len(layer_types) - 1)))),
        )
    if draw(st.booleans()):
        fields["rope_scaling"] = YarnScaling(
            factor=draw(st.floats(1.0, 64.0)),
            original_max_position_embeddings=draw(st.integers(1, 10**6)),
            beta_fast=draw(st.floats(16.0, 64.0)),
            truncate=draw(st.booleans()),
            attention_factor=draw(st.one_of(st.none(), st.floats(0.5, 2.0))),
        )
    return ModelConfig(layer_types=layer_types, **fields)


@settings(max_examples=200, deadline=None)
@given(configs())
def test_any_model_survives_the_disk(config: ModelConfig) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


def test_sizes_of_an_absent_part_survive_an_ablation() -> None:
    config = preset("nano-5m").with_(layer_types=(FULL_ATTENTION,) * 4)
    assert from_hf(to_hf(config)) == config
    ungated = config.with_(attention_output_gate=False)
    assert from_hf(to_hf(ungated)) == ungated


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.just(10**400),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["yarn", "default", "full_attention", "qwen3", "qwen3_moe", "qnext"]),
    st.lists(st.one_of(st.integers(-2, 5), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(
        st.sampled_from(
            [
                "rope_type",
                "type",
                "factor",
                "rope_theta",
                "partial_rotary_factor",
                "beta_fast",
                "truncate",
                "original_max_position_embeddings",
                "attention_factor",
            ]
        ),
        st.one_of(st.none(), st.booleans(), st.integers(-2, 40), st.floats(), st.just("yarn"), st.just([])),
        max_size=5,
    ),
)
KEYS = [
    *released_80b(),
    "rope_parameters",
    "layer_types",
    "num_nextn_predict_layers",
    "num_local_experts",
    "attention_output_gate",
    "zero_centered_norm",
    "mtp_uses_final_norm",
    "sliding_window",
    "attention_bias",
    "max_window_layers",
    "original_max_position_embeddings",
    "text_config",
    "top_p",
]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=4), st.sampled_from(["next", "moe", "qnext"]))
def test_junk_is_read_or_refused_and_never_crashes(changes: dict[str, Any], base: str) -> None:
    ablation = preset("nano-5m").with_(attention_output_gate=False)
    start = {"next": released_80b, "moe": moe_values, "qnext": lambda: to_hf(ablation)}[base]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QnextWarning)
            config = from_hf({**start, **changes})
    except (ConfigError, NotSupported) as error:
        assert str(error).startswith("config.json: ")
        assert "\n" not in str(error)
        return
    assert isinstance(config, ModelConfig)


@pytest.mark.parametrize("name", ["Qwen3NextConfig", "Qwen3Config"])
def test_what_transformers_writes_is_read(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 96,
        "hidden_size": 40,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
    }
    written = json.loads(json.dumps(getattr(transformers, name)(**sizes).to_dict()))
    config = from_hf(written)
    assert {key: getattr(config, key) for key in sizes} == sizes
    expected = 0.25 if name == "Qwen3NextConfig" else 1.0
    assert config.partial_rotary_factor == expected


def test_transformers_reads_what_is_written() -> None:
    transformers = pytest.importorskip("transformers")
    for name, kind in (
        ("80b-a3b", "Qwen3NextConfig"),
        ("qwen3-30b-a3b", "Qwen3MoeConfig"),
        ("qwen3-32b", "Qwen3Config"),
    ):
        config = preset(name).with_yarn(4.0)
        theirs = getattr(transformers, kind)(**to_hf(config))
        assert theirs.rope_parameters["rope_type"] == "yarn"
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
        ours_again = from_hf(json.loads(json.dumps({**theirs.to_dict(), "head_dim": config.head_dim})))
        assert ours_again == config.with_(num_nextn_predict_layers=ours_again.num_nextn_predict_layers)
