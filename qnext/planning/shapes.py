"""Name and shape of every parameter of a model, from its configuration alone. No torch.

The names are those of the modules: experts stacked, one head, MTP last. A test compares the list with the module.
"""

from __future__ import annotations

from collections.abc import Iterator

from qnext.config import LINEAR_ATTENTION, ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All parameters in the order of a checkpoint; a tied head is not a parameter of its own."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i, kind in enumerate(config.layer_types):
        shapes.update(_layer(config, f"model.layers.{i}.", kind == LINEAR_ATTENTION, config.is_moe_layer(i)))
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if config.num_nextn_predict_layers:
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            shapes[f"mtp.{name}.weight"] = (hidden,)
        shapes.update(_layer(config, "mtp.layers.0.", False, config.num_experts > 0))
    return shapes


def _layer(config: ModelConfig, prefix: str, is_linear: bool, is_moe: bool) -> Iterator[tuple[str, Shape]]:
    yield prefix + "input_layernorm.weight", (config.hidden_size,)
    if is_linear:
        yield from _delta_net(config, prefix + "linear_attn.")
    else:
        yield from _attention(config, prefix + "self_attn.")
    yield prefix + "post_attention_layernorm.weight", (config.hidden_size,)
    if is_moe:
        yield from _sparse_moe(config, prefix + "mlp.")
    else:
        yield from _mlp(prefix + "mlp.", config.hidden_size, config.intermediate_size)


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    query_dim = config.num_attention_heads * config.head_dim
    key_dim = config.num_key_value_heads * config.head_dim
    out_dims = {
        "q_proj": query_dim * (2 if config.attention_output_gate else 1), "k_proj": key_dim, "v_proj": key_dim,
    }  # fmt: skip
    for name, out_dim in out_dims.items():
        yield f"{prefix}{name}.weight", (out_dim, config.hidden_size)
        if config.attention_bias:
            yield f"{prefix}{name}.bias", (out_dim,)
    yield prefix + "o_proj.weight", (config.hidden_size, query_dim)
    if config.attention_bias:
        yield prefix + "o_proj.bias", (config.hidden_size,)
    yield prefix + "q_norm.weight", (config.head_dim,)
    yield prefix + "k_norm.weight", (config.head_dim,)


def _delta_net(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    heads, hidden = config.linear_num_value_heads, config.hidden_size
    yield prefix + "in_proj_qkvz.weight", (2 * config.linear_key_dim + 2 * config.linear_value_dim, hidden)
    yield prefix + "in_proj_ba.weight", (2 * heads, hidden)
    yield prefix + "conv1d.weight", (config.linear_conv_dim, 1, config.linear_conv_kernel_dim)
    yield prefix + "A_log", (heads,)
    yield prefix + "dt_bias", (heads,)
    yield prefix + "norm.weight", (config.linear_value_head_dim,)
    yield prefix + "out_proj.weight", (hidden, config.linear_value_dim)


def _sparse_moe(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    yield prefix + "gate.weight", (experts, hidden)
    yield prefix + "experts.gate_up_proj", (experts, 2 * width, hidden)
    yield prefix + "experts.down_proj", (experts, hidden, width)
    if config.shared_expert_intermediate_size:
        yield from _mlp(prefix + "shared_expert.", hidden, config.shared_expert_intermediate_size)
        yield prefix + "shared_expert_gate.weight", (1, hidden)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)
