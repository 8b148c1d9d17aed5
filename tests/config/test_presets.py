"""Presets: sizes that can be checked against published figures, and the derived properties."""

from __future__ import annotations

import pytest

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, PRESETS, YarnScaling, hybrid_pattern, preset
from qnext.errors import ConfigError, ModelNotFound


def test_80b_has_the_released_layout() -> None:
    config = preset("80b-a3b")
    full = [i for i, kind in enumerate(config.layer_types) if kind == FULL_ATTENTION]
    assert full == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47]
    assert (config.num_linear_layers, config.num_full_layers) == (36, 12)
    assert (config.linear_key_dim, config.linear_value_dim, config.linear_conv_dim) == (2048, 4096, 8192)
    assert config.rotary_dim == 64
    assert all(config.is_moe_layer(i) for i in range(48))


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"80b-a3b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b"}))
def test_the_family_keeps_its_proportions(name: str) -> None:
    config = preset(name)
    hidden = config.hidden_size
    assert config.linear_key_dim == hidden
    assert config.linear_value_dim == 2 * hidden
    assert config.num_attention_heads * config.head_dim == 2 * hidden
    assert config.moe_intermediate_size == config.shared_expert_intermediate_size == hidden // 4
    assert config.num_linear_layers == 3 * config.num_full_layers


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="nano-5m"):
        preset("70b")


def test_with_layers_repeats_and_cuts_the_pattern() -> None:
    config = preset("80b-a3b")
    assert config.with_layers(16).layer_types == hybrid_pattern(16, interval=4)
    assert config.with_layers(60).layer_types == hybrid_pattern(60, interval=4)
    assert config.with_layers(2).layer_types == (LINEAR_ATTENTION, LINEAR_ATTENTION)
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        config.with_layers(0)


def test_with_layers_keeps_only_the_dense_layers_that_are_left() -> None:
    config = preset("80b-a3b").with_(mlp_only_layers=(1, 40))
    assert config.with_layers(8).mlp_only_layers == (1,)


def test_with_yarn_stretches_from_the_trained_length_also_when_repeated() -> None:
    config = preset("80b-a3b").with_yarn(4.0)
    assert config.max_position_embeddings == 4 * 262_144
    again = config.with_yarn(2.0)
    assert again.max_position_embeddings == 2 * 262_144
    assert again.rope_scaling is not None
    assert again.rope_scaling.original_max_position_embeddings == 262_144


def test_yarn_in_a_config_that_kept_its_length_stretches_the_context() -> None:
    config = preset("80b-a3b")
    assert config.context_length == 262_144
    stretched = config.with_(rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=262_144))
    assert stretched.max_position_embeddings == 262_144 and stretched.context_length == 1_048_576 >= 1_010_000


def test_sparse_step_counts_layers_from_one() -> None:
    config = preset("80b-a3b").with_(decoder_sparse_step=3, mlp_only_layers=(5,))
    assert [i for i in range(12) if config.is_moe_layer(i)] == [2, 8, 11]
