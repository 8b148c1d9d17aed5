"""What planning promises is what the module holds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, PRESETS, ModelConfig, preset
from qnext.model import CausalLM, SparseMoE
from qnext.model.attention import Attention
from qnext.model.delta_net import GatedDeltaNet
from qnext.planning import (
    ParameterCounts,
    count_active,
    count_parameters,
    kv_bytes_per_token,
    list_parameters,
    state_bytes_per_sequence,
    weight_bytes,
)


def _ablations() -> dict[str, ModelConfig]:
    nano = preset("nano-5m")
    return {
        **{name: preset(name) for name in PRESETS},
        "no gate, untied": replace(nano, attention_output_gate=False, tie_word_embeddings=False),
        "all full, no mtp": replace(nano, layer_types=("full_attention",) * 3, num_nextn_predict_layers=0),
        "bias": replace(nano, attention_bias=True),
        "dense first layer": replace(nano, mlp_only_layers=(0, 3), intermediate_size=96),
        "dense with mtp": replace(nano, num_experts=0, intermediate_size=96, shared_expert_intermediate_size=0),
        "no shared expert": replace(nano, shared_expert_intermediate_size=0),
        "every second sparse": replace(nano, decoder_sparse_step=2, intermediate_size=72),
        "uneven heads": replace(nano, linear_num_value_heads=12, linear_value_head_dim=24, linear_conv_kernel_dim=3),
    }


CONFIGS = _ablations()


def _meta_model(config: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config)


def _size(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def _counts_of_module(model: CausalLM) -> ParameterCounts:
    """Counted by walking the modules, without their names."""
    layers = list(model.model.layers)
    mixers = [m for layer in layers for m in layer.modules() if isinstance(m, (Attention, GatedDeltaNet))]
    moes = [layer.mlp for layer in layers if isinstance(layer.mlp, SparseMoE)]
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    shared_gates = [moe.shared_expert_gate for moe in moes if moe.shared_expert is not None]
    return ParameterCounts(
        embedding=_size(model.model.embed_tokens),
        head=0 if model.config.tie_word_embeddings else _size(model.lm_head),
        attention=_size(*(m for m in mixers if isinstance(m, Attention))),
        delta_net=_size(*(m for m in mixers if isinstance(m, GatedDeltaNet))),
        dense_mlp=_size(*(layer.mlp for layer in layers if not isinstance(layer.mlp, SparseMoE))),
        router=_size(*(moe.gate for moe in moes)),
        experts=_size(*(moe.experts for moe in moes)),
        shared_experts=_size(*(moe.shared_expert for moe in moes), *shared_gates),
        norms=_size(*norms, model.model.norm),
        mtp=_size(model.mtp),
    )


def random_config(seed: int) -> ModelConfig:
    """Sizes that have nothing to do with each other, switches at random."""
    draw = random.Random(seed)
    num_layers, groups, linear_keys = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 3)
    layer_types = tuple(draw.choice((FULL_ATTENTION, LINEAR_ATTENTION)) for _ in range(num_layers))
    has_linear, experts = LINEAR_ATTENTION in layer_types, draw.choice((0, 5, 12))
    linear = {
        "linear_num_key_heads": linear_keys,
        "linear_num_value_heads": linear_keys * draw.randint(1, 3),
        "linear_key_head_dim": draw.choice((8, 24)),
        "linear_value_head_dim": draw.choice((16, 40)),
        "linear_conv_kernel_dim": draw.randint(2, 5),
    }
    sparse = {
        "num_experts": experts,
        "num_experts_per_tok": draw.randint(1, 3),
        "moe_intermediate_size": draw.randint(9, 40),
        "shared_expert_intermediate_size": draw.choice((0, draw.randint(9, 40))),
        "mlp_only_layers": tuple(i for i in range(num_layers) if draw.random() < 0.3),
        "decoder_sparse_step": draw.randint(1, 2),
    }
    return ModelConfig(
        vocab_size=draw.randint(50, 500),
        hidden_size=draw.randint(10, 90),
        layer_types=layer_types,
        num_attention_heads=groups * draw.randint(1, 4),
        num_key_value_heads=groups,
        head_dim=draw.choice((8, 16, 48)),
        rope_theta=1e4,
        max_position_embeddings=256,
        attention_bias=draw.random() < 0.3,
        attention_output_gate=draw.random() < 0.7,
        intermediate_size=draw.randint(9, 90),
        tie_word_embeddings=draw.random() < 0.5,
        num_nextn_predict_layers=draw.randint(0, 1),
        **(linear if has_linear else {}),
        **(sparse if experts else {}),
    )


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 50))])
def test_random_configurations_count_as_their_module(seed: int) -> None:
    _check(random_config(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_counts_equal_the_module(name: str) -> None:
    _check(CONFIGS[name])


def _check(config: ModelConfig) -> None:
    model = _meta_model(config)
    shapes = {name: info.shape for name, info in list_parameters(config).items()}
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    counts = count_parameters(config)
    assert counts == _counts_of_module(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert weight_bytes(config) == 2 * counts.total


def test_released_model() -> None:
    """Published element counts (79.67 B + 1.65 B) and the active parameters that its name rounds."""
    config = preset("80b-a3b")
    counts = count_parameters(config)
    assert (counts.trunk, counts.mtp) == (79_674_391_296, 1_650_471_424)
    active = count_active(config)
    assert round(active.without_head / 1e9, 2) == 3.25
    assert round(active.with_head / 1e9, 2) == 3.56
    assert kv_bytes_per_token(config) == 24 * 1024
    assert kv_bytes_per_token(config, with_mtp=True) == 26 * 1024
    assert kv_bytes_per_token(config, dtype="float8_e4m3fn") == 12 * 1024
    state = state_bytes_per_sequence(config)
    assert (state.recurrent, state.conv) == (72 << 20, 36 * 8192 * 3 * 4)
    assert state.total == state.recurrent + state.conv


@pytest.mark.parametrize(("name", "kib"), [("qwen3-30b-a3b", 96), ("qwen3-32b", 256)])
def test_compared_systems_keep_no_state(name: str, kib: int) -> None:
    assert kv_bytes_per_token(preset(name)) == kib * 1024
    assert state_bytes_per_sequence(preset(name)).total == 0


def test_active_of_a_dense_model_is_everything_but_the_embedding() -> None:
    config = preset("qwen3-32b")
    counts, active = count_parameters(config), count_active(config)
    assert active.with_head == counts.total - counts.embedding
    assert active.without_head == active.with_head - counts.head


def test_a_tied_head_is_active_but_not_counted_twice() -> None:
    tied = preset("nano-5m")
    untied = replace(tied, tie_word_embeddings=False)
    assert count_active(tied) == count_active(untied)
    assert count_parameters(untied).total - count_parameters(tied).total == tied.vocab_size * tied.hidden_size
