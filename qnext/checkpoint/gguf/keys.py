"""ModelConfig to the keys of a GGUF file and back. No torch.

Keys are those that llama.cpp reads (src/llama-arch.cpp, src/models/qwen3next.cpp). What it has no key for stands
under `qnext.`, which other readers ignore.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qnext.checkpoint.gguf.container import GgufFile, Value
from qnext.checkpoint.gguf.names import architecture
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, YarnScaling, hybrid_pattern
from qnext.errors import ConfigError, UsageError

ARCHITECTURES = ("qwen3next", "qwen3moe", "qwen3")
_MAX_LAYERS = 4096
_MAX_EXPERTS = 1 << 20  # of all layers; each has names of its own in a folder
_PLAIN = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_NEXT = {
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_OTHER = (
    "block_count", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned", "nextn_predict_layers", "ssm.inner_size", "attention.recurrent_layers",
    "full_attention_interval", "vocab_size",
)  # fmt: skip
# Keys whose only supported value is given; another value changes the arithmetic.
_FIXED: dict[str, Value] = {
    "attention.causal": True, "expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_gating_func": 1,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.attn_factor": 1.0,
}  # fmt: skip
_OWN_NUMBERS = ("initializer_range", "router_aux_loss_coef")
_TOKENS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}


def refuse_unsupported(config: ModelConfig) -> None:
    """Raise UsageError for what none of llama.cpp's architectures computes, naming the field."""
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
    fields = _PLAIN | (_EXPERTS if config.num_experts else {}) | (_NEXT if is_next else {})
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
    for field in _OWN_NUMBERS:
        keys[f"qnext.{field}"] = float(getattr(config, field))
    for field, key in _TOKENS.items():
        if getattr(config, field) is not None:
            keys[f"tokenizer.ggml.{key}"] = getattr(config, field)
    if config.eos_token_ids:
        keys["tokenizer.ggml.eos_token_id"] = config.eos_token_ids[0]
        keys["qnext.eos_token_ids"] = list(config.eos_token_ids)
    return keys


class _Keys:
    """Typed reading of the keys of one architecture. Every error names file and key."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.name = str(file.keys.get("general.architecture"))[:60]
        if self.name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.error("general.architecture", f"{self.name!r} is not supported; known: {known}")

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file.path}: key {key}: {problem}")

    def full(self, key: str) -> str:
        return key if key.startswith(("tokenizer.", "qnext.", "general.")) else f"{self.name}.{key}"

    def get(self, key: str, default: Value | None = None) -> Value:
        value = self.file.keys.get(self.full(key), default)
        if value is None:
            raise self.error(self.full(key), "missing")
        return value

    def has(self, key: str) -> bool:
        return self.full(key) in self.file.keys

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value < 2**53:
            raise self.error(self.full(key), f"must be a number of things, not {str(value)[:60]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A fp32 number becomes the shortest decimal that stands for it: 1e-06, not 9.99999997e-07."""
        value = self.get(key, default)
        if type(value) is not float or not math.isfinite(value):
            raise self.error(self.full(key), f"must be a finite number, not {str(value)[:60]}")
        return float(str(np.float32(value))) if abs(value) < 3e38 else value

    def refuse_unknown(self) -> None:
        known = {self.full(key) for key in (*_PLAIN, *_EXPERTS, *_NEXT, *_OTHER, *_FIXED)}
        for key in self.file.keys:
            if key.startswith(self.name + ".") and key not in known:
                raise self.error(key, "unknown; it may change what the model computes")
        for key, only in _FIXED.items():
            if self.has(key) and self.get(key) != only:
                raise self.error(self.full(key), f"{str(self.get(key))[:60]} is not supported, only {only}")


def config_from_keys(file: GgufFile) -> ModelConfig:
    """The configuration that a file describes. Raises ConfigError naming file and key."""
    keys = _Keys(file)
    keys.refuse_unknown()
    is_next = keys.name == "qwen3next"
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path}: tensor token_embd.weight is missing")
    fields = _PLAIN | (_EXPERTS if keys.name != "qwen3" else {}) | (_NEXT if is_next else {})
    values: dict[str, Any] = {
        field: keys.integer(key, 0 if field == "intermediate_size" and keys.name != "qwen3" else None)
        for key, field in fields.items()
    }
    num_mtp = keys.integer("nextn_predict_layers", 0)
    head_dim = keys.integer("attention.key_length")
    if keys.integer("attention.value_length") != head_dim:
        raise keys.error(keys.full("attention.value_length"), "differs from attention.key_length")
    if head_dim == 0:
        raise keys.error(keys.full("attention.key_length"), "must be positive, not 0")
    values |= {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "layer_types": _layer_types(keys, num_mtp),
        "num_nextn_predict_layers": num_mtp,
        "head_dim": head_dim,
        "partial_rotary_factor": _rotary_share(keys.integer("rope.dimension_count", head_dim), head_dim),
        "rope_theta": keys.number("rope.freq_base"),
        "rope_scaling": _rope_scaling(keys),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "attention_output_gate": is_next,
        "zero_centered_norm": is_next,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if is_next:
        values["linear_value_head_dim"] = values["linear_key_head_dim"]
        inner = values["linear_value_head_dim"] * values["linear_num_value_heads"]
        if keys.integer("ssm.inner_size") != inner:
            raise keys.error(keys.full("ssm.inner_size"), f"must be state_size * time_step_rank = {inner}")
    for field in _OWN_NUMBERS:
        if keys.has(f"qnext.{field}"):
            values[field] = keys.number(f"qnext.{field}")
    for field, key in _TOKENS.items():
        if keys.has(f"tokenizer.ggml.{key}"):
            values[field] = keys.integer(f"tokenizer.ggml.{key}")
    values["eos_token_id"] = _eos_token_id(keys)
    if values.get("num_experts", 0) * len(values["layer_types"]) > _MAX_EXPERTS:
        raise keys.error(keys.full("expert_count"), f"more than {_MAX_EXPERTS} experts in all layers")
    try:
        config = ModelConfig(**values)
        refuse_unsupported(config)
    except (ConfigError, UsageError) as error:
        raise ConfigError(f"{file.path}: {error}") from None
    return config


def _layer_types(keys: _Keys, num_mtp: int) -> tuple[str, ...]:
    num_blocks = keys.integer("block_count")
    if not num_mtp < num_blocks <= _MAX_LAYERS:
        raise keys.error(keys.full("block_count"), f"{num_blocks} with {num_mtp} layers of multi-token prediction")
    num_layers = num_blocks - num_mtp
    if keys.name != "qwen3next":
        return (FULL_ATTENTION,) * num_layers
    if not keys.has("attention.recurrent_layers"):
        interval = keys.integer("full_attention_interval")
        if interval < 1:
            raise keys.error(keys.full("full_attention_interval"), f"must be at least 1, not {interval}")
        return hybrid_pattern(num_layers, interval=interval)
    linear = keys.get("attention.recurrent_layers")
    is_list = isinstance(linear, list) and all(type(item) is bool for item in linear)
    if not is_list or len(linear) != num_blocks or any(linear[num_layers:]):  # type: ignore[arg-type,index]
        raise keys.error(keys.full("attention.recurrent_layers"), f"must hold {num_blocks} truth values")
    return tuple(LINEAR_ATTENTION if is_linear else FULL_ATTENTION for is_linear in linear[:num_layers])  # type: ignore[index]


def _rotary_share(rotary_dim: int, head_dim: int) -> float:
    """The factor from which ModelConfig computes exactly `rotary_dim` again."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else (rotary_dim + 0.5) / head_dim


def _rope_scaling(keys: _Keys) -> YarnScaling | None:
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none" or (kind == "linear" and keys.number("rope.scaling.factor", 1.0) == 1.0):
        return None
    if kind != "yarn":
        raise keys.error(keys.full("rope.scaling.type"), f"{str(kind)[:60]!r} is not supported, only 'yarn'")
    try:
        return YarnScaling(
            factor=keys.number("rope.scaling.factor"),
            original_max_position_embeddings=keys.integer("rope.scaling.original_context_length"),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    except ConfigError as error:
        raise error if str(error).startswith(str(keys.file.path)) else keys.error("rope.scaling", str(error)) from None


def _eos_token_id(keys: _Keys) -> int | tuple[int, ...] | None:
    if not keys.has("tokenizer.ggml.eos_token_id"):
        return None
    first = keys.integer("tokenizer.ggml.eos_token_id")
    if not keys.has("qnext.eos_token_ids"):
        return first
    ids = keys.get("qnext.eos_token_ids")
    if not isinstance(ids, list) or not ids or any(type(item) is not int for item in ids) or ids[0] != first:
        raise keys.error("qnext.eos_token_ids", "contradicts tokenizer.ggml.eos_token_id")
    return first if len(ids) == 1 else tuple(ids)  # type: ignore[arg-type]
