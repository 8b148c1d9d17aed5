"""Every parameter of a model, from its configuration alone: name, shape and kind. No torch.

Counting, initialising, loading, quantising, update rules and sharding read this list, so no code takes a name apart.
The names are those of the modules: experts stacked, one head, MTP last. A test compares the list with the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from qnext.config import LINEAR_ATTENTION, ModelConfig

Shape = tuple[int, ...]


class Kind(Enum):
    """The place of a parameter in the architecture."""

    EMBEDDING = "embedding"
    HEAD = "head"
    FINAL_NORM = "final norm"
    INPUT_NORM = "norm before the mixer"
    POST_NORM = "norm before the feed-forward"
    QUERY = "query projection"
    KEY = "key projection"
    VALUE = "value projection"
    ATTENTION_OUT = "output projection of attention"
    BIAS = "bias"
    QUERY_NORM = "query norm"
    KEY_NORM = "key norm"
    DELTA_QKVZ = "q, k, v, z projection of Gated DeltaNet"
    DELTA_BA = "b, a projection of Gated DeltaNet"
    CONVOLUTION = "convolution"
    A_LOG = "decay rates"
    DT_BIAS = "time constants"
    DELTA_NORM = "gated norm"
    DELTA_OUT = "output projection of Gated DeltaNet"
    MLP_GATE = "gate of a dense MLP"
    MLP_UP = "up projection of a dense MLP"
    MLP_DOWN = "down projection of a dense MLP"
    ROUTER = "router"
    EXPERTS_GATE_UP = "gate and up projections of the experts"
    EXPERTS_DOWN = "down projections of the experts"
    SHARED_GATE = "gate of the shared expert"
    SHARED_UP = "up projection of the shared expert"
    SHARED_DOWN = "down projection of the shared expert"
    SHARED_SCALE = "gate that scales the shared expert"
    MTP_FC = "projection into the MTP layer"
    MTP_EMBEDDING_NORM = "norm of the MTP layer's embedding"
    MTP_HIDDEN_NORM = "norm of the MTP layer's hidden state"
    MTP_NORM = "norm after the MTP layer"


# Norms whose scale is 1 + weight where the configuration says so. DELTA_NORM is always a plain one.
NORMS = frozenset(
    {
        Kind.FINAL_NORM,
        Kind.INPUT_NORM,
        Kind.POST_NORM,
        Kind.QUERY_NORM,
        Kind.KEY_NORM,
        Kind.MTP_EMBEDDING_NORM,
        Kind.MTP_HIDDEN_NORM,
        Kind.MTP_NORM,
    }
)

# Matrices that schemes of fewer bits store; a head has a choice of its own. Norms and vectors are none of them.
QUANTIZED = frozenset(
    {
        Kind.QUERY,
        Kind.KEY,
        Kind.VALUE,
        Kind.ATTENTION_OUT,
        Kind.DELTA_QKVZ,
        Kind.DELTA_OUT,
        Kind.MLP_GATE,
        Kind.MLP_UP,
        Kind.MLP_DOWN,
        Kind.EXPERTS_GATE_UP,
        Kind.EXPERTS_DOWN,
        Kind.SHARED_GATE,
        Kind.SHARED_UP,
        Kind.SHARED_DOWN,
    }
)


class ParameterInfo(NamedTuple):
    """One parameter.

    `part` is its field of ParameterCounts. `layer` counts the trunk's layers, then the MTP module; None is outside of
    layers. `expert_axis` is the axis of the experts. `shard_axis` is the axis that tensor parallelism cuts; None means
    that every rank has the whole parameter. `sections` are the lengths along it that are cut separately (none: the
    whole axis is one section).
    """

    name: str
    shape: Shape
    kind: Kind
    part: str
    layer: int | None = None
    expert_axis: int | None = None
    shard_axis: int | None = None
    sections: tuple[int, ...] = ()

    @property
    def block_shape(self) -> Shape:
        """The shape of one expert's block in a stack, otherwise of the whole parameter."""
        return self.shape if self.expert_axis is None else self.shape[1:]


def list_parameters(config: ModelConfig) -> dict[str, ParameterInfo]:
    """All parameters by name, in the order of a checkpoint. A tied head is not a parameter of its own."""
    return {info.name: info for info in _model(config)}


def _model(config: ModelConfig) -> Iterator[ParameterInfo]:
    table = (config.vocab_size, config.hidden_size)
    yield ParameterInfo("model.embed_tokens.weight", table, Kind.EMBEDDING, "embedding", shard_axis=0)
    for i, kind in enumerate(config.layer_types):
        yield from _layer(config, f"model.layers.{i}.", i, kind == LINEAR_ATTENTION, config.is_moe_layer(i))
    yield ParameterInfo("model.norm.weight", (config.hidden_size,), Kind.FINAL_NORM, "norms")
    if not config.tie_word_embeddings:
        yield ParameterInfo("lm_head.weight", table, Kind.HEAD, "head", shard_axis=0)
    if config.num_nextn_predict_layers:
        for info in _mtp(config):
            yield info._replace(part="mtp", layer=config.num_hidden_layers)


def _mtp(config: ModelConfig) -> Iterator[ParameterInfo]:
    hidden = config.hidden_size
    yield ParameterInfo("mtp.fc.weight", (hidden, 2 * hidden), Kind.MTP_FC, "mtp")
    yield ParameterInfo("mtp.pre_fc_norm_embedding.weight", (hidden,), Kind.MTP_EMBEDDING_NORM, "mtp")
    yield ParameterInfo("mtp.pre_fc_norm_hidden.weight", (hidden,), Kind.MTP_HIDDEN_NORM, "mtp")
    yield ParameterInfo("mtp.norm.weight", (hidden,), Kind.MTP_NORM, "mtp")
    yield from _layer(config, "mtp.layers.0.", config.num_hidden_layers, False, config.num_experts > 0)


def _layer(config: ModelConfig, prefix: str, layer: int, is_linear: bool, is_moe: bool) -> Iterator[ParameterInfo]:
    norm = (config.hidden_size,)
    mixer = _delta_net(config) if is_linear else _attention(config)
    feed_forward = _sparse_moe(config) if is_moe else _dense_mlp(config)
    for info in (
        ParameterInfo("input_layernorm.weight", norm, Kind.INPUT_NORM, "norms"),
        *mixer,
        ParameterInfo("post_attention_layernorm.weight", norm, Kind.POST_NORM, "norms"),
        *feed_forward,
    ):
        yield info._replace(name=prefix + info.name, layer=layer)


def _attention(config: ModelConfig) -> Iterator[ParameterInfo]:
    query_dim = config.num_attention_heads * config.head_dim
    key_dim = config.num_key_value_heads * config.head_dim
    for name, kind, out_dim in (
        ("q_proj", Kind.QUERY, query_dim * (2 if config.attention_output_gate else 1)),
        ("k_proj", Kind.KEY, key_dim),
        ("v_proj", Kind.VALUE, key_dim),
    ):
        yield ParameterInfo(f"self_attn.{name}.weight", (out_dim, config.hidden_size), kind, "attention", shard_axis=0)
        if config.attention_bias:
            yield ParameterInfo(f"self_attn.{name}.bias", (out_dim,), Kind.BIAS, "attention", shard_axis=0)
    out = (config.hidden_size, query_dim)
    yield ParameterInfo("self_attn.o_proj.weight", out, Kind.ATTENTION_OUT, "attention", shard_axis=1)
    if config.attention_bias:
        yield ParameterInfo("self_attn.o_proj.bias", (config.hidden_size,), Kind.BIAS, "attention")
    yield ParameterInfo("self_attn.q_norm.weight", (config.head_dim,), Kind.QUERY_NORM, "attention")
    yield ParameterInfo("self_attn.k_norm.weight", (config.head_dim,), Kind.KEY_NORM, "attention")


def _delta_net(config: ModelConfig) -> Iterator[ParameterInfo]:
    heads, hidden = config.linear_num_value_heads, config.hidden_size
    key_dim, value_dim = config.linear_key_dim, config.linear_value_dim
    channels = (config.linear_conv_dim, 1, config.linear_conv_kernel_dim)
    for name, shape, kind in (
        ("in_proj_qkvz.weight", (2 * key_dim + 2 * value_dim, hidden), Kind.DELTA_QKVZ),
        ("in_proj_ba.weight", (2 * heads, hidden), Kind.DELTA_BA),
        ("conv1d.weight", channels, Kind.CONVOLUTION),
        ("A_log", (heads,), Kind.A_LOG),
        ("dt_bias", (heads,), Kind.DT_BIAS),
    ):
        sections = (key_dim, key_dim, value_dim) if kind is Kind.CONVOLUTION else ()
        yield ParameterInfo(f"linear_attn.{name}", shape, kind, "delta_net", shard_axis=0, sections=sections)
    norm = (config.linear_value_head_dim,)
    yield ParameterInfo("linear_attn.norm.weight", norm, Kind.DELTA_NORM, "delta_net")
    out = (hidden, value_dim)
    yield ParameterInfo("linear_attn.out_proj.weight", out, Kind.DELTA_OUT, "delta_net", shard_axis=1)


def _sparse_moe(config: ModelConfig) -> Iterator[ParameterInfo]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    yield ParameterInfo("mlp.gate.weight", (experts, hidden), Kind.ROUTER, "router")
    for name, shape, kind, axis, sections in (
        ("gate_up_proj", (experts, 2 * width, hidden), Kind.EXPERTS_GATE_UP, 1, (width, width)),
        ("down_proj", (experts, hidden, width), Kind.EXPERTS_DOWN, 2, ()),
    ):
        yield ParameterInfo(
            f"mlp.experts.{name}", shape, kind, "experts", expert_axis=0, shard_axis=axis, sections=sections
        )
    shared = config.shared_expert_intermediate_size
    if shared:
        kinds = (Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN)
        yield from _mlp("mlp.shared_expert.", hidden, shared, kinds, "shared_experts")
        yield ParameterInfo("mlp.shared_expert_gate.weight", (1, hidden), Kind.SHARED_SCALE, "shared_experts")


def _dense_mlp(config: ModelConfig) -> Iterator[ParameterInfo]:
    kinds = (Kind.MLP_GATE, Kind.MLP_UP, Kind.MLP_DOWN)
    return _mlp("mlp.", config.hidden_size, config.intermediate_size, kinds, "dense_mlp")


def _mlp(prefix: str, hidden: int, width: int, kinds: tuple[Kind, Kind, Kind], part: str) -> Iterator[ParameterInfo]:
    gate, up, down = kinds
    yield ParameterInfo(f"{prefix}gate_proj.weight", (width, hidden), gate, part, shard_axis=0)
    yield ParameterInfo(f"{prefix}up_proj.weight", (width, hidden), up, part, shard_axis=0)
    yield ParameterInfo(f"{prefix}down_proj.weight", (hidden, width), down, part, shard_axis=1)
