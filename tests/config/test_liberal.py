"""config.json as people have it: keys left out, keys added, other spellings; the reference is transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qnext.config import ModelConfig, from_hf, preset, read_config, to_hf
from qnext.config.families import FAMILIES
from qnext.config.keys import NEUTRAL, NEUTRAL_ELSEWHERE, NEUTRAL_IN_HYBRID, UNUSED, WITHOUT_EFFECT
from qnext.errors import ConfigError, NotSupported, QnextWarning

from .test_hf import YARN, released_80b, without

_QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "max_window_layers": 48,
}
# The released files of the other families: keys and values.
RELEASED: dict[str, dict[str, Any]] = {
    "80B-A3B-Instruct": released_80b(),
    "30B-A3B": _MOE,
    "Coder-30B-A3B": {
        **without(_MOE, "attention_bias", "bos_token_id"),
        "intermediate_size": 5472,
        "max_position_embeddings": 262144,
        "max_window_layers": 28,
        "qkv_bias": False,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0,
        "transformers_version": "4.52.3",
        "use_qk_norm": True,
    },
    "235B-A22B": {
        **_MOE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
        "max_window_layers": 94,
    },
    "0.6B": {
        **_QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "32B": {
        **_QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_window_layers": 64,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
CLASSES = {"qwen3_next": "Qwen3NextConfig", "qwen3_moe": "Qwen3MoeConfig", "qwen3": "Qwen3Config"}


def quiet(values: dict[str, Any], **more: Any) -> ModelConfig:
    """The configuration, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", QnextWarning)
        return from_hf(values, **more)


def of_reference(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers' class makes of the keys that decide the arithmetic."""
    import transformers

    theirs = getattr(transformers, CLASSES[values["model_type"]])(**json.loads(json.dumps(values)))
    rope = theirs.rope_parameters
    layers = getattr(theirs, "layer_types", None) or ["full_attention"] * theirs.num_hidden_layers
    found = {
        "layer_types": tuple(layers),
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        # The attention of Qwen3-MoE asks for head_dim this way.
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
    }
    for key in FAMILIES[values["model_type"]].keys & set(ModelConfig.__dataclass_fields__) - {*found}:
        if hasattr(theirs, key):
            value = getattr(theirs, key)
            found[key] = tuple(value) if isinstance(value, list) else value
    return found | {"rope_scaling": None}


def assert_same(config: ModelConfig, values: dict[str, Any]) -> None:
    expected = of_reference(values)
    assert {key: getattr(config, key) for key in expected} == expected


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
    "dtype": "auto", "torch_dtype": "auto", "_name_or_path": "x/y", "use_return_dict": True, "pruned_heads": {},
    "is_encoder_decoder": False, "tie_encoder_decoder": False, "chunk_size_feed_forward": 0, "torchscript": False,
    "keys_to_ignore_at_inference": ["past_key_values"], "transformers.js_config": {"dtype": "q4"},
    "_attn_implementation_autoset": True, "id2label": {"0": "LABEL_0"}, "num_labels": 2, "hf_device_map": {"": 0},
    "cross_attention_hidden_size": None, "add_cross_attention": False, "base_model_tp_plan": {"a": "colwise"},
    "attn_implementation": "flash_attention_2", "experts_implementation": "grouped_mm", "is_decoder": True,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "do_sample": False, "max_length": 20, "bad_words_ids": None,
    "typical_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0, "suppress_tokens": None, "output_scores": False,
    # vLLM, SGLang, Megatron exports
    "mlp_bias": False, "qkv_bias": False, "use_qk_norm": True, "qk_layernorm": True, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "n_group": 1, "topk_group": 1, "topk_method": "greedy", "first_k_dense_replace": 0,
    "moe_layer_freq": 1, "use_mrope": False, "pretraining_tp": 1, "final_logit_softcapping": None,
    "rope_interleaved": False, "logit_scale": 1.0, "dual_chunk_attention_config": None, "is_causal": True,
    # llm-compressor, modelopt, mlx, GPTQModel
    "quantization_config": None, "quantization": None, "compression_config": None, "head_dtype": "float32",
    # unsloth, ms-swift, TRL, PEFT
    "unsloth_fixed": True, "unsloth_version": "2025.9.4", "model_name": "m", "router_jitter_noise": 0.0,
    "base_model_name_or_path": "Qwen/Qwen3", "classifier_dropout": 0.0, "pad_token_id": -1, "problem_type": None,
    "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False, "layer_types": None,
    "rope_scaling": {}, "rope_parameters": {}, "partial_rotary_factor": None, "num_local_experts": None,
    "mtp_num_hidden_layers": 0, "num_nextn_predict_layers": 0, "mtp_use_dedicated_embeddings": False,
    "mamba_ssm_dtype": "float32", "decoder_start_token_id": None, "tokenizer_class": "Qwen2Tokenizer",
}  # fmt: skip


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
    assert line == "config.json: unknown keys soft_cap, linear_attn_magic, x\N{REPLACEMENT CHARACTER}y, passed over"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1), ("router_jitter_noise", 0.01), ("temperature", 0.7), ("do_sample", True),
        ("max_new_tokens", 2048), ("suppress_tokens", [5]),
    ],
)  # fmt: skip
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
        for name in ("qwen2", "qwen2_moe", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl", "qwen3_vl_moe",
                     "qwen3_omni_moe", "llama", "deepseek_v3", "gpt_oss")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), UNSUPPORTED)
def test_what_is_not_implemented_is_no_damage(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupported) as caught:
        from_hf({**released_80b(), **changes}, file="some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_may_be_written_as_floats() -> None:
    floats = {key: float(value) if type(value) is int else value for key, value in released_80b().items()}
    assert quiet(floats) == from_hf(released_80b())
    assert type(quiet(floats).hidden_size) is int
    assert quiet({**released_80b(), "rms_norm_eps": 1}).rms_norm_eps == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": None, "sliding_window": 32768},
        {"use_sliding_window": True, "sliding_window": 262144},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 10000000.0}},
        {"rope_scaling": {"rope_type": None, "factor": None}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
        {"rope_scaling": {"mrope_section": [24, 20, 20], "type": "mrope"}},
        {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 1e7}, "linear_attention": None}},
        {"partial_rotary_factor": None, "rope_parameters": {"partial_rotary_factor": 0.25}},
        {"eos_token_id": [151645.0]},
        {"architectures": "Qwen3NextForCausalLM"},
        {"architectures": ["Qwen3NextModel"]},
        {"architectures": ["FSDPQwen3NextForCausalLM"]},
        {"architectures": []},
        {"pad_token_id": -1},
    ],
)
def test_other_spellings_of_the_released_file(changes: dict[str, Any]) -> None:
    config, expected = quiet({**released_80b(), **changes}), from_hf(released_80b())
    assert config.with_(eos_token_id=expected.eos_token_id) == expected
    assert config.eos_token_ids == expected.eos_token_ids


def test_windows_of_a_dense_model_count_from_a_layer_on() -> None:
    values = {**RELEASED["32B"], "use_sliding_window": True, "sliding_window": 4096}
    assert quiet({**values, "max_window_layers": 64}) == quiet(RELEASED["32B"])
    assert "sliding_attention" not in of_reference({**values, "max_window_layers": 64})["layer_types"]
    with pytest.raises(NotSupported, match="use_sliding_window"):
        from_hf({**values, "max_window_layers": 28})


@pytest.mark.parametrize(
    "block",
    [
        YARN,
        {**YARN, "mscale": 1.0},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
        {**YARN, "attention_factor": 1.2, "truncate": False},
        {**YARN, "beta_fast": 20, "beta_slow": 2.0},
        {**YARN, "original_max_position_embeddings": 65536.0},
        {**without(YARN, "original_max_position_embeddings")},
        {**YARN, "factor": None, "original_max_position_embeddings": 65536},
        {**without(YARN, "rope_type"), "type": "yarn"},
    ],
)
def test_yarn_turns_as_the_references(block: dict[str, Any]) -> None:
    """Frequencies and the factor of cos and sin, whatever the block leaves out."""
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from qnext.model import CausalLM

    values = {**released_80b(), "num_hidden_layers": 4, "vocab_size": 8, "rope_scaling": block, "eos_token_id": None,
              "bos_token_id": None, "num_experts": 10}  # fmt: skip
    theirs = transformers.Qwen3NextConfig(**json.loads(json.dumps(values)))
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    config = quiet(values)
    rotary = CausalLM(config.with_(hidden_size=16, moe_intermediate_size=8)).model.rotary
    positions = torch.tensor([0, 1, 77, 3000])
    angles = positions[:, None] * frequencies
    for ours, expected in zip(rotary(positions), (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(ours, expected * factor, rtol=0, atol=3e-4)  # fp32 angles up to 3,000


def test_a_wrapper_of_several_modalities_has_one_language_model() -> None:
    text = {**RELEASED["30B-A3B"]}
    wrapper = {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "vision_config": {"depth": 3}}
    expected = quiet(text)
    assert quiet({**wrapper, "llm_config": text}) == expected
    assert quiet({**wrapper, "text_config": text, "hidden_size": 7}) == expected
    outer = {**wrapper, "tie_word_embeddings": True, "eos_token_id": 5}
    inner = without(text, "tie_word_embeddings", "eos_token_id")
    assert quiet({**outer, "text_config": inner}) == expected.with_(tie_word_embeddings=True, eos_token_id=5)
    flat_and_nested = {**without(text, "rope_theta"), "text_config": {"rope_theta": 1000000, "vocab_size": 151936}}
    assert quiet(flat_and_nested) == expected
    with pytest.raises(NotSupported, match="model_type: 'qwen3_vl_moe' is not supported"):
        from_hf({"model_type": "qwen3_vl_moe", "text_config": {**text, "model_type": "qwen3_vl_moe_text"}})


def test_tokens_outside_the_vocabulary_are_passed_over() -> None:
    with pytest.warns(QnextWarning, match="eos_token_id 151645 is outside the vocabulary of 1000"):
        config = from_hf({**released_80b(), "vocab_size": 1000, "eos_token_id": [151645, 5], "bos_token_id": None})
    assert config.eos_token_ids == (5,)


def test_drafting_layers_that_are_not_known_are_not_used() -> None:
    with pytest.warns(QnextWarning, match="num_nextn_predict_layers is 3"):
        assert from_hf({**released_80b(), "num_nextn_predict_layers": 3}).num_nextn_predict_layers == 0
    with pytest.warns(QnextWarning, match="mtp_num_hidden_layers is 1: only Qwen3-Next's"):
        assert from_hf({**RELEASED["32B"], "mtp_num_hidden_layers": 1}) == quiet(RELEASED["32B"])


def test_tensors_say_what_the_file_leaves_open() -> None:
    values = without(released_80b(), "num_key_value_heads", "layer_types", "full_attention_interval", "head_dim")
    layers = ["linear_attention", "full_attention"] * 24
    config = quiet(values, tensors_say={"num_key_value_heads": 4, "layer_types": layers, "head_dim": 64})
    assert (config.num_key_value_heads, config.head_dim, config.layer_types) == (4, 64, tuple(layers))
    # What the file says stands, but for the rows of the embedding and a head of its own.
    assert quiet(released_80b(), tensors_say={"head_dim": 64}) == from_hf(released_80b())
    with pytest.warns(QnextWarning, match="the embedding has 152064 rows"):
        assert from_hf(released_80b(), tensors_say={"vocab_size": 152064}).vocab_size == 152064
    with pytest.warns(QnextWarning, match="lm_head.weight differs"):
        tied = {**released_80b(), "tie_word_embeddings": True}
        assert not from_hf(tied, tensors_say={"tie_word_embeddings": False}).tie_word_embeddings


def test_files_of_ablations_are_our_own_and_whole() -> None:
    values = to_hf(preset("nano-5m").with_(attention_output_gate=False))
    for key in ("hidden_size", "rope_theta", "layer_types", "norm_topk_prob", "zero_centered_norm"):
        with pytest.raises(ConfigError, match=f"{key}: missing"):
            from_hf(without(values, key))


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match="git lfs pull"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["Coder-30B-A3B", "80B-A3B-Instruct"])
def test_released_keys_over_the_references_own_tensors(tmp_path: Path, name: str) -> None:
    """The released config.json, its sizes made small, beside what transformers 5 writes of its state: same logits."""
    import torch
    import transformers

    from qnext.checkpoint import load_model
    from qnext.model import Batch

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
             "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
             "eos_token_id": 1, "bos_token_id": None}  # fmt: skip
    if name == "80B-A3B-Instruct":
        sizes |= {"shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                  "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
    values = {**RELEASED[name], **sizes}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(values)))
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ids_T = torch.arange(5, 30)
        expected = theirs(ids_T[None]).logits[0]
        theirs.save_pretrained(tmp_path, save_original_format=False)
        (tmp_path / "config.json").write_text(json.dumps(values))
        model = load_model(tmp_path)
        logits = model.logits(model(Batch.from_lengths(ids_T, [len(ids_T)])).hidden_TD)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
