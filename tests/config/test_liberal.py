"""config.json as people have it: keys left out, keys added, other spellings; the reference is transformers."""

from __future__ import annotations

from typing import Any

import pytest

from qnext.config import from_hf
from qnext.config.families import FAMILIES
from qnext.config.keys import NEUTRAL, NEUTRAL_ELSEWHERE, NEUTRAL_IN_HYBRID, UNUSED, WITHOUT_EFFECT
from qnext.errors import ConfigError, NotSupported, QnextWarning
from tests.config.references import RELEASED, YARN, assert_same, quiet, released_80b, without


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_read_without_a_word(name: str) -> None:
    assert_same(quiet(RELEASED[name]), RELEASED[name])


@pytest.mark.parametrize("name", RELEASED)
def test_each_key_left_out_means_what_the_reference_takes(name: str) -> None:
    for key in RELEASED[name]:
        values = without(RELEASED[name], key)
        if key == "num_key_value_heads" and name == "0.6B":
            with pytest.raises(ConfigError, match="multiple of num_key_value_heads"):
                from_hf(values)  # the reference takes 32 for 16 heads, and fails when it computes
            continue
        config = quiet(values)
        assert_same(config, {"model_type": RELEASED[name]["model_type"], **values})
        if key not in ("num_key_value_heads", "partial_rotary_factor"):  # the reference itself reads their null apart
            assert quiet({**values, key: None}) == config


def test_only_the_family_must_be_named() -> None:
    """Everything left out at once, for each family."""
    for model_type in ("qwen3_next", "qwen3_moe", "qwen3"):
        values = {"model_type": model_type}
        assert_same(quiet(values), values)
        architecture = {"architectures": [FAMILIES[model_type].architecture]}
        assert quiet(architecture) == quiet(values)


ADDED: dict[str, Any] = {
    # transformers, several generations
    "dtype": "auto",
    "torch_dtype": "auto",
    "_name_or_path": "x/y",
    "use_return_dict": True,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "torchscript": False,
    "keys_to_ignore_at_inference": ["past_key_values"],
    "transformers.js_config": {"dtype": "q4"},
    "_attn_implementation_autoset": True,
    "id2label": {"0": "LABEL_0"},
    "num_labels": 2,
    "hf_device_map": {"": 0},
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "base_model_tp_plan": {"a": "colwise"},
    "attn_implementation": "flash_attention_2",
    "experts_implementation": "grouped_mm",
    "is_decoder": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "do_sample": False,
    "max_length": 20,
    "bad_words_ids": None,
    "typical_p": 1.0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "suppress_tokens": None,
    "output_scores": False,
    # vLLM, SGLang, Megatron exports
    "mlp_bias": False,
    "qkv_bias": False,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "use_mrope": False,
    "pretraining_tp": 1,
    "final_logit_softcapping": None,
    "rope_interleaved": False,
    "logit_scale": 1.0,
    "dual_chunk_attention_config": None,
    "is_causal": True,
    # llm-compressor, modelopt, mlx, GPTQModel
    "quantization_config": None,
    "quantization": None,
    "compression_config": None,
    "head_dtype": "float32",
    # unsloth, ms-swift, TRL, PEFT
    "unsloth_fixed": True,
    "unsloth_version": "2025.9.4",
    "model_name": "m",
    "router_jitter_noise": 0.0,
    "base_model_name_or_path": "Qwen/Qwen3",
    "classifier_dropout": 0.0,
    "pad_token_id": -1,
    "problem_type": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "layer_types": None,
    "rope_scaling": {},
    "rope_parameters": {},
    "partial_rotary_factor": None,
    "num_local_experts": None,
    "mtp_num_hidden_layers": 0,
    "num_nextn_predict_layers": 0,
    "mtp_use_dedicated_embeddings": False,
    "mamba_ssm_dtype": "float32",
    "decoder_start_token_id": None,
    "tokenizer_class": "Qwen2Tokenizer",
}


@pytest.mark.parametrize("name", RELEASED)
def test_each_key_that_programs_add_changes_nothing(name: str) -> None:
    expected = quiet(RELEASED[name])
    neutral = NEUTRAL_IN_HYBRID if expected.has_linear_layers else NEUTRAL_ELSEWHERE
    added = [*ADDED.items(), *dict.fromkeys(NEUTRAL).items()]
    added += [(key, value) for key, allowed in {**NEUTRAL, **neutral}.items() for value in allowed]
    for key, value in added:
        if value is not None or key not in RELEASED[name]:
            assert quiet({**RELEASED[name], key: value}) == expected, key


def test_tables_of_keys_do_not_overlap() -> None:
    deciding = set().union(*(family.keys for family in FAMILIES.values())) - {"shared_expert_intermediate_size"}
    tables: list[set[str]] = [deciding, set(WITHOUT_EFFECT), set(UNUSED), {*NEUTRAL, *NEUTRAL_IN_HYBRID}]
    for i, table in enumerate(tables):
        for other in tables[:i]:
            assert not table & other


def test_unknown_keys_are_one_warning() -> None:
    values = {**released_80b(), "soft_cap": 30.0, "linear_attn_magic": [1], "void": None, "x\ny": 1}
    with pytest.warns(QnextWarning) as caught:
        assert from_hf(values) == from_hf(released_80b())
    (line,) = [str(each.message) for each in caught]
    assert line == "config.json: unknown keys soft_cap, linear_attn_magic, x\N{REPLACEMENT CHARACTER}y, ignored"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1),
        ("router_jitter_noise", 0.01),
        ("temperature", 0.7),
        ("do_sample", True),
        ("max_new_tokens", 2048),
        ("suppress_tokens", [5]),
    ],
)
def test_a_value_that_nothing_uses_is_said(key: str, value: Any) -> None:
    with pytest.warns(QnextWarning, match=f"config.json: {key} is "):
        assert from_hf({**released_80b(), key: value}) == from_hf(released_80b())


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    ({"use_qk_norm": False}, "use_qk_norm: False"),
    ({"qkv_bias": True}, "qkv_bias: True"),
    ({"mlp_bias": True}, "mlp_bias: True"),
    ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window: True"),
    ({"use_sliding_window": True}, "use_sliding_window: True"),
    ({"use_sliding_window": True, "sliding_window": 262144, "rope_scaling": YARN}, "use_sliding_window: True"),
    ({"full_attention_interval": None, "layer_types": ["sliding_attention"] * 48}, "layer_types"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: 'linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    ({"rope_scaling": {**YARN, "attn_factor": 2}}, "rope_scaling.attn_factor: 2"),
    ({"rope_scaling": {**YARN, "apply_yarn_scaling": False}}, "rope_scaling.apply_yarn_scaling: False"),
    ({"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid'"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor: 2.5"),
    ({"n_shared_experts": 2}, "n_shared_experts: 2"),
    ({"attn_output_gate": False}, "attn_output_gate: False"),
    ({"attention_output_gate": False}, "attention_output_gate: False"),
    ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
    ({"is_causal": False}, "is_causal: False"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    ({"architectures": ["Qwen3NextForSequenceClassification"]}, "architectures: 'Qwen3NextForSequenceClassification'"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures: 'LlamaForCausalLM'"),
    *(
        ({"model_type": name, "architectures": None}, f"model_type: '{name}' is not supported; supported are qwen3_")
        for name in (
            "qwen2",
            "qwen2_moe",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_vl",
            "qwen3_vl_moe",
            "qwen3_omni_moe",
            "llama",
            "deepseek_v3",
            "gpt_oss",
        )
    ),
]


@pytest.mark.parametrize(("changes", "words"), UNSUPPORTED)
def test_what_is_not_implemented_is_no_damage(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupported) as caught:
        from_hf({**released_80b(), **changes}, file="some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
