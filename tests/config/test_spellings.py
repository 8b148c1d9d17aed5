"""Other spellings of released files, and what their tensors say, are read for what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qnext.config import from_hf, preset, to_hf
from qnext.errors import ConfigError, NotSupported, QnextWarning
from tests.config.folder import read_config
from tests.config.references import RELEASED, YARN, of_reference, quiet, released_80b, without


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

    values = {
        **released_80b(),
        "num_hidden_layers": 4,
        "vocab_size": 8,
        "rope_scaling": block,
        "eos_token_id": None,
        "bos_token_id": None,
        "num_experts": 10,
    }
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

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if name == "80B-A3B-Instruct":
        sizes |= {
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        }
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
