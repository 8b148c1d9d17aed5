"""ModelConfig to the keys of a GGUF file. No torch.

Keys are those that llama.cpp reads (src/llama-arch.cpp, src/models/qwen3next.cpp). Values that have no such key are
under `qnext.`, which other readers ignore. `read_keys.py` is the other direction.
"""

from __future__ import annotations

from typing import Any

from qnext.checkpoint.gguf.container import Value
from qnext.checkpoint.gguf.names import architecture
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, hybrid_pattern
from qnext.errors import UsageError

PLAIN = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
NEXT = {
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
OWN_NUMBERS = ("initializer_range", "router_aux_loss_coef")
TOKENS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}


def refuse_unsupported(config: ModelConfig) -> None:
    """Raise UsageError for a model that none of llama.cpp's architectures computes, naming the field."""
    is_next = config.zero_centered_norm and config.attention_output_gate
    if not is_next and (config.zero_centered_norm or config.attention_output_gate or config.has_linear_layers):
        raise UsageError("GGUF has no architecture for this ablation (attention_output_gate, zero_centered_norm)")
    needed: dict[str, tuple[Any, Any]] = {
        "attention_bias": (config.attention_bias, False),
        "mlp_only_layers": (config.mlp_only_layers, ()),
        "mtp_uses_final_norm": (config.mtp_uses_final_norm, True),
    }
    if config.num_experts:
        needed["norm_topk_prob"] = (config.norm_topk_prob, True)
        needed["decoder_sparse_step"] = (config.decoder_sparse_step, 1)
    if config.rope_scaling is not None:
        needed["rope_scaling.attention_factor"] = (config.rope_scaling.attention_factor, None)
        needed["rope_scaling.truncate"] = (config.rope_scaling.truncate, True)
    if is_next:
        needed["linear_value_head_dim"] = (config.linear_value_head_dim, config.linear_key_head_dim)
        for name in ("num_experts", "shared_expert_intermediate_size", "linear_num_key_heads"):
            if getattr(config, name) == 0:
                raise UsageError(f"{name} is 0; llama.cpp's qwen3next needs it")
    else:
        needed["num_nextn_predict_layers"] = (config.num_nextn_predict_layers, 0)
        needed["shared_expert_intermediate_size"] = (config.shared_expert_intermediate_size, 0)
        needed["partial_rotary_factor"] = (config.partial_rotary_factor, 1.0)
    for name, (value, only) in needed.items():
        if value != only:
            raise UsageError(f"{name} is {value!r}; llama.cpp's {architecture(config)} computes only {only!r}")


def config_to_keys(config: ModelConfig) -> dict[str, Value]:
    """The keys of `general.architecture` and of the architecture. Raises UsageError: see refuse_unsupported."""
    refuse_unsupported(config)
    name = architecture(config)
    is_next = name == "qwen3next"
    fields = PLAIN | (EXPERTS if config.num_experts else {}) | (NEXT if is_next else {})
    values: dict[str, Value] = {"block_count": config.num_hidden_layers + config.num_nextn_predict_layers}
    values |= {key: getattr(config, field) for key, field in fields.items()}
    values["attention.key_length"] = values["attention.value_length"] = config.head_dim
    values["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    values["rope.freq_base"] = float(config.rope_theta)
    if is_next:
        values["rope.dimension_count"] = config.rotary_dim
        values["ssm.inner_size"] = config.linear_value_dim
        linear = [kind == LINEAR_ATTENTION for kind in config.layer_types]
        values["attention.recurrent_layers"] = linear + [False] * config.num_nextn_predict_layers
        if FULL_ATTENTION in config.layer_types:
            interval = config.layer_types.index(FULL_ATTENTION) + 1
            if config.layer_types == hybrid_pattern(config.num_hidden_layers, interval=interval):
                values["full_attention_interval"] = interval  # all that older readers know
        if config.num_nextn_predict_layers:
            values["nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
    keys: dict[str, Value] = {"general.architecture": name, "general.type": "model"}
    keys |= {f"{name}.{key}": value for key, value in values.items()}
    for field in OWN_NUMBERS:
        keys[f"qnext.{field}"] = float(getattr(config, field))
    for field, key in TOKENS.items():
        if getattr(config, field) is not None:
            keys[f"tokenizer.ggml.{key}"] = getattr(config, field)
    if config.eos_token_ids:
        keys["tokenizer.ggml.eos_token_id"] = config.eos_token_ids[0]
        keys["qnext.eos_token_ids"] = list(config.eos_token_ids)
    return keys
