"""Every parameter is what the list says that it is: compared with the modules, and cut as tensor parallelism will."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, PRESETS, ModelConfig, preset
from qnext.model import Batch, CausalLM, DecoderLayer, Experts, Router
from qnext.model.layers import GatedRMSNorm, RMSNorm
from qnext.planning import Kind, ParameterInfo, list_parameters
from qnext.planning.parameters import NORMS
from tests.model.models import make_model, next_config

_SINGLE = {Kind.EMBEDDING, Kind.HEAD, Kind.FINAL_NORM, Kind.MTP_FC, Kind.MTP_NORM}
_LINEAR_SUFFIX = {
    "q_proj": Kind.QUERY,
    "k_proj": Kind.KEY,
    "v_proj": Kind.VALUE,
    "o_proj": Kind.ATTENTION_OUT,
    "in_proj_qkvz": Kind.DELTA_QKVZ,
    "in_proj_ba": Kind.DELTA_BA,
    "out_proj": Kind.DELTA_OUT,
    "shared_expert_gate": Kind.SHARED_SCALE,
    "fc": Kind.MTP_FC,
    "lm_head": Kind.HEAD,
}


def random_config(seed: int) -> ModelConfig:
    draw = random.Random(seed)
    num_layers = draw.randint(1, 5)
    return replace(
        preset("nano-5m"),
        layer_types=tuple(draw.choice((LINEAR_ATTENTION, FULL_ATTENTION)) for _ in range(num_layers)),
        vocab_size=draw.randint(1, 300),
        hidden_size=draw.randint(1, 90),
        attention_output_gate=draw.random() < 0.5,
        attention_bias=draw.random() < 0.5,
        tie_word_embeddings=draw.random() < 0.5,
        num_experts=draw.choice((0, 4, 7)),
        num_experts_per_tok=draw.randint(1, 4),
        moe_intermediate_size=draw.randint(1, 40),
        shared_expert_intermediate_size=draw.choice((0, 24)),
        intermediate_size=draw.randint(1, 60),
        decoder_sparse_step=draw.randint(1, 3),
        mlp_only_layers=(draw.randrange(num_layers),) if draw.random() < 0.5 else (),
        linear_conv_kernel_dim=draw.randint(1, 5),
        num_nextn_predict_layers=draw.randint(0, 1),
    )


CONFIGS = {name: preset(name) for name in PRESETS} | {f"random {seed}": random_config(seed) for seed in range(40)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_list_is_that_of_the_module(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    infos = list_parameters(config)
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert all(name == info.name for name, info in infos.items())
    kinds = [info.kind for info in infos.values() if info.kind in _SINGLE]
    assert len(kinds) == len(set(kinds))
    for name, info in infos.items():
        _check_kind(model, name, info)


def _check_kind(model: CausalLM, name: str, info: ParameterInfo) -> None:
    path, _, key = name.rpartition(".")
    owner, last = model.get_submodule(path), path.split(".")[-1]
    assert (info.kind in NORMS) == isinstance(owner, RMSNorm), name
    assert (info.kind is Kind.DELTA_NORM) == isinstance(owner, GatedRMSNorm), name
    assert (info.kind is Kind.EMBEDDING) == isinstance(owner, nn.Embedding), name
    assert (info.kind is Kind.CONVOLUTION) == isinstance(owner, nn.Conv1d), name
    assert (info.kind is Kind.ROUTER) == isinstance(owner, Router), name
    assert (info.expert_axis == 0) == isinstance(owner, Experts), name
    assert (info.kind is Kind.BIAS) == (key == "bias"), name
    assert (info.kind is Kind.A_LOG, info.kind is Kind.DT_BIAS) == (key == "A_log", key == "dt_bias"), name
    if last in _LINEAR_SUFFIX and key == "weight":
        assert info.kind is _LINEAR_SUFFIX[last], name
    assert (info.part == "mtp") == name.startswith("mtp."), name
    pieces = path.split(".")
    in_trunk = int(pieces[2]) if pieces[1:2] == ["layers"] and pieces[0] == "model" else None
    assert info.layer == (model.config.num_hidden_layers if info.part == "mtp" else in_trunk), name


def cut(values: Tensor, info: ParameterInfo, rank: int, num_ranks: int) -> Tensor:
    """What a rank holds of a parameter."""
    if info.shard_axis is None:
        return values
    sections = values.split(info.sections or values.shape[info.shard_axis], dim=info.shard_axis)
    return torch.cat([section.chunk(num_ranks, dim=info.shard_axis)[rank] for section in sections], info.shard_axis)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_output_gate": False, "attention_bias": True}])
def test_shards_compute_the_whole(changes: dict[str, bool]) -> None:
    """Every mixer and feed-forward, cut in two by the axes of the list: the sum of both halves is the whole."""
    config = next_config(
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=8,
        intermediate_size=20,
        mlp_only_layers=(1,),
        **changes,
    )
    half = replace(
        config,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        moe_intermediate_size=6,
        shared_expert_intermediate_size=4,
        intermediate_size=10,
    )
    model = make_model(config, dtype=torch.float64)
    infos, weights = list_parameters(config), dict(model.named_parameters())
    batch = Batch.from_lengths(torch.arange(9), [9])
    rope = model.model.rotary(batch.positions_T)
    x_TD = torch.randn(9, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        ranks = []
        for rank in range(2):
            kind = config.layer_types[layer.layer_index]
            shard = DecoderLayer(half, layer.layer_index, kind=kind, is_moe=layer.is_moe).to(torch.float64)
            prefix = f"model.layers.{layer.layer_index}."
            for name, parameter in shard.named_parameters():
                values = cut(weights[prefix + name], infos[prefix + name], rank, 2)
                # A bias behind a sum over ranks is added by one of them.
                is_added_once = name.endswith("o_proj.bias")
                parameter.copy_(values * (rank == 0) if is_added_once else values)
            ranks.append(shard)
        for compute in (_mix, lambda layer, x, *_: layer.mlp(x)):
            parts = [compute(shard, x_TD, batch, rope) for shard in ranks]
            assert torch.allclose(sum(parts), compute(layer, x_TD, batch, rope), rtol=1e-9, atol=1e-11)


def _mix(layer: DecoderLayer, x_TD: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]) -> Tensor:
    return layer.linear_attn(x_TD, batch) if layer.is_linear else layer.self_attn(x_TD, batch, rope)
