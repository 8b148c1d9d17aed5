"""The keys of a GGUF file to a ModelConfig. No torch.

An absent key means what llama.cpp's reader takes for it (src/llama-model.cpp, src/models/qwen3*.cpp). Where that leaves
a choice, the tensors decide. An unknown key changes nothing in llama.cpp either.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qnext.checkpoint.gguf.container import GgufFile, Value
from qnext.checkpoint.gguf.keys import EXPERTS, NEXT, OWN_NUMBERS, PLAIN, TOKENS, refuse_unsupported
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, YarnScaling, hybrid_pattern
from qnext.errors import ConfigError, NotSupported, UsageError, warn

# general.architecture -> which models that is
ARCHITECTURES = {
    "qwen3next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen3moe": "Qwen3 with experts, Qwen3-Coder",
    "qwen3": "dense Qwen3",
}
# values of general.type, and of general.architecture where that says it -> what such a file is
OTHER_FILES = {
    "adapter": "a LoRA adapter",
    "mmproj": "a projector of images or sound",
    "clip": "a projector of images or sound",
    "imatrix": "an importance matrix for quantising",
    "controlvector": "a control vector",
    "vocab": "a vocabulary without a model",
}
_OTHER_KEYS = (
    "block_count",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "nextn_predict_layers",
    "ssm.inner_size",
    "attention.recurrent_layers",
    "full_attention_interval",
)
# Keys that llama.cpp knows and that do not touch these architectures.
WITHOUT_EFFECT = (
    "vocab_size",
    "rope.scaling.finetuned",
    "rope.dimension_sections",
    "rope.dimension_count_swa",
    "rope.freq_base_swa",
    "attention.layer_norm_epsilon",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "tensor_data_layout",
    "token_shift_count",
    "ssm.dt_b_c_rms",
    "mrope_sections",
    "rope.mrope_section",
    "rope.mrope_interleaved",
)
_OFF, _SCALE = (0.0, False), (0.0, 1.0)
# Keys that are read as long as they say what is computed anyway; another value would change the arithmetic.
NEUTRAL_VALUES: dict[str, tuple[Value, ...]] = {
    "attention.causal": (True,),
    "pooling_type": (0,),
    "expert_weights_norm": (True,),
    "norm_top_k_prob": (True,),
    "expert_weights_scale": _SCALE,
    "expert_gating_func": (0, 1),
    "expert_shared_count": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "swiglu_clamp_exp": _OFF,
    "swiglu_clamp_shexp": _OFF,
    "hidden_activation": ("silu", "swish"),
    "logit_scale": _SCALE,
    "residual_scale": _SCALE,
    "embedding_scale": _SCALE,
    "attention.output_scale": _SCALE,
    "attention.value_scale": _SCALE,
    "attention.clamp_kqv": _OFF,
    "attention.max_alibi_bias": _OFF,
    "attention.sliding_window": _OFF,
    "attention.temperature_scale": _OFF,
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
    "router_logit_softcapping": _OFF,
    "use_parallel_residual": (False,),
    "n_deepstack_layers": (0,),
    "num_loops": (0, 1),
    "ssm.v_head_reordered": (False,),
    "rope.scale_linear": _SCALE,
    "rope.scaling.alpha": _SCALE,
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": _OFF,
}
_MAX_LAYERS = 4096
_MAX_EXPERTS = 1 << 20  # of all layers; each has names of its own in a folder
_INTERVAL = 4  # what llama.cpp takes without full_attention_interval, and all that its first readers knew
_FREQUENCY_BASE = 10_000.0
_SHOWN = 8
_MTP_PARTS = ("eh_proj", "enorm", "hnorm", "shared_head_norm")


def config_from_keys(file: GgufFile) -> ModelConfig:
    """The configuration that a file describes.

    Raises ConfigError naming file and key for what is missing or contradictory, NotSupported for other kinds of files
    and for values that are not implemented.
    """
    keys = _ArchitectureKeys(file)
    keys.refuse_other_values()
    is_next = keys.name == "qwen3next"
    num_layers, num_mtp = _layers(keys)
    head_dim = _head_dim(keys)
    values: dict[str, Any] = _sizes(keys) | {
        "vocab_size": _vocab_size(keys),
        "layer_types": _layer_types(keys, num_layers),
        "num_nextn_predict_layers": num_mtp,
        "head_dim": head_dim,
        "partial_rotary_factor": _rotary_share(keys.integer("rope.dimension_count", head_dim), head_dim),
        "rope_theta": keys.number("rope.freq_base", _FREQUENCY_BASE),
        "rope_scaling": _rope_scaling(keys),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "attention_output_gate": is_next,
        "zero_centered_norm": is_next,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for field in OWN_NUMBERS:
        if keys.has(f"qnext.{field}"):
            values[field] = keys.number(f"qnext.{field}")
    for field, key in TOKENS.items():
        values[field] = keys.token(f"tokenizer.ggml.{key}", values["vocab_size"])
    values["eos_token_id"] = _eos_token_id(keys, values["vocab_size"])
    if values.get("num_experts", 0) * num_layers > _MAX_EXPERTS:
        raise keys.error(keys.full("expert_count"), f"more than {_MAX_EXPERTS} experts in all layers")
    try:
        config = ModelConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None
    try:
        refuse_unsupported(config)
    except UsageError as error:
        raise NotSupported(f"{file.path}: {error}") from None
    return config


class _ArchitectureKeys:
    """Typed reading of the keys of one architecture. Every error names file and key."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.name = _architecture(file)

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file.path}: key {key}: {problem}")

    def unsupported(self, key: str, problem: str) -> NotSupported:
        return NotSupported(f"{self.file.path}: key {self.full(key)}: {problem}")

    def full(self, key: str) -> str:
        return key if key.startswith(("tokenizer.", "qnext.", "general.")) else f"{self.name}.{key}"

    def get(self, key: str, default: Value | None = None) -> Value:
        """The value, of a list with one value for every layer that one: zeros stand for layers without the thing."""
        value = self.file.keys.get(self.full(key), default)
        if value is None:
            raise self.error(self.full(key), "missing")
        if isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
            kinds = {item for item in value if item} or {0} if value else set()
            if len(kinds) > 1:
                raise self.unsupported(key, f"{len(kinds)} different values for the layers are not supported, only one")
            value = next(iter(kinds), value)
        return value

    def has(self, key: str) -> bool:
        return self.full(key) in self.file.keys

    def has_tensor(self, name: str) -> bool:
        return name in self.file.tensors

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 <= value < 2**53:
            raise self.error(self.full(key), f"must be a whole number, at least 0, not {str(value)[:60]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A fp32 number becomes the shortest decimal that stands for it: 1e-06, not 9.99999997e-07."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise self.error(self.full(key), f"must be a finite number, not {str(value)[:60]}")
        value = float(value)  # type: ignore[arg-type]
        return float(str(np.float32(value))) if abs(value) < 3e38 else value

    def token(self, key: str, num_tokens: int) -> int | None:
        """The id of a token. One that is none is passed over, as llama.cpp does; -1 is how some tools write none."""
        value = self.file.keys.get(key)
        if value is None or value == -1:
            return None
        if type(value) is not int or not 0 <= value < num_tokens:
            warn(f"{self.file.path}: key {key}: {str(value)[:60]} is no token and is ignored")
            return None
        return value

    def refuse_other_values(self) -> None:
        known = {*PLAIN, *EXPERTS, *NEXT, *_OTHER_KEYS, *NEUTRAL_VALUES, *WITHOUT_EFFECT}
        known |= {"attention.scale", "embedding_length_out"}
        prefix = f"{self.name}."
        unknown = [key for key in self.file.keys if key.startswith(prefix) and key.removeprefix(prefix) not in known]
        if unknown:
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            warn(f"{self.file.path}: unknown keys are ignored: {', '.join(unknown[:_SHOWN])}{more}")
        for key, neutral in NEUTRAL_VALUES.items():
            if self.has(key) and self.get(key) not in neutral:
                only = " or ".join(str(value) for value in neutral)
                raise self.unsupported(key, f"{str(self.get(key))[:60]} is not supported, only {only}")
        width = self.get("embedding_length_out", 0)
        if width not in (0, self.get("embedding_length")):
            raise self.unsupported("embedding_length_out", f"{str(width)[:60]} is not supported")


def _architecture(file: GgufFile) -> str:
    """Raises NotSupported for a file that holds something else, saying what."""
    kind, name = (str(file.keys.get(f"general.{key}"))[:60] for key in ("type", "architecture"))
    for value in (kind, name):
        if value in OTHER_FILES:
            raise NotSupported(f"{file.path}: {OTHER_FILES[value]} ({value}), no model")
    if name not in ARCHITECTURES:
        known = ", ".join(f"{known} ({models})" for known, models in ARCHITECTURES.items())
        raise NotSupported(f"{file.path}: key general.architecture: {name!r} is not supported; known: {known}")
    if not file.tensors:
        raise NotSupported(f"{file.path}: {OTHER_FILES['vocab']}: it holds no tensors")
    if "blk.0.attn_norm.weight" not in file.tensors and any(".nextn." in tensor for tensor in file.tensors):
        raise NotSupported(f"{file.path}: a layer of multi-token prediction without its model")
    if "cls.output.weight" in file.tensors:
        raise NotSupported(f"{file.path}: tensor cls.output.weight: a classifier or reranker is not supported")
    return name


def _sizes(keys: _ArchitectureKeys) -> dict[str, int]:
    """The fields that are numbers under one key."""
    is_next, has_experts = keys.name == "qwen3next", keys.name != "qwen3"
    defaults: dict[str, int] = {"attention.head_count_kv": keys.integer("attention.head_count")}
    if has_experts:
        num_used = keys.integer("expert_used_count")
        num_neurons = keys.integer("feed_forward_length", 0)
        defaults["feed_forward_length"] = 0
        if num_neurons and num_used:
            defaults["expert_feed_forward_length"] = num_neurons // num_used
            defaults["expert_shared_feed_forward_length"] = num_neurons
    fields = PLAIN | (EXPERTS if has_experts else {}) | (NEXT if is_next else {})
    values = {field: keys.integer(key, defaults.get(key)) for key, field in fields.items()}
    if is_next:
        values["linear_value_head_dim"] = values["linear_key_head_dim"]
        inner = values["linear_value_head_dim"] * values["linear_num_value_heads"]
        if keys.integer("ssm.inner_size", inner) != inner:
            raise keys.unsupported("ssm.inner_size", f"must be state_size * time_step_rank = {inner}")
    return values


def _vocab_size(keys: _ArchitectureKeys) -> int:
    if not keys.has_tensor("token_embd.weight"):
        raise ConfigError(f"{keys.file.path}: tensor token_embd.weight is missing")
    num_rows = keys.file.tensors["token_embd.weight"].shape[0]
    tokens = keys.file.keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > num_rows:
        raise keys.error("tokenizer.ggml.tokens", f"{len(tokens)} tokens, token_embd.weight has {num_rows} rows")
    return num_rows


def _head_dim(keys: _ArchitectureKeys) -> int:
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", keys.integer("embedding_length") // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.unsupported("attention.value_length", "differs from attention.key_length")
    if head_dim == 0:
        raise keys.error(keys.full("attention.key_length"), "must be positive, not 0")
    scale = keys.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise keys.unsupported("attention.scale", f"{scale} is not supported, only 1 / sqrt(attention.key_length)")
    return head_dim


def _layers(keys: _ArchitectureKeys) -> tuple[int, int]:
    """Layers of the trunk and of multi-token prediction. What the keys announce is checked against the tensors."""
    num_blocks = keys.integer("block_count")
    if not 0 < num_blocks <= _MAX_LAYERS:
        raise keys.error(keys.full("block_count"), f"{num_blocks} layers; 1 to {_MAX_LAYERS} are read")
    found = [i for i in range(num_blocks + 1) if keys.has_tensor(f"blk.{i}.nextn.eh_proj.weight")]
    if num_blocks in found:  # some tools do not count it
        num_blocks += 1
    num_mtp = keys.integer("nextn_predict_layers", 0) or len(found)
    parts = [f"blk.{i}.nextn.{part}.weight" for i in found for part in _MTP_PARTS]
    if num_mtp and (not found or not all(map(keys.has_tensor, parts))):
        warn(f"{keys.file.path}: multi-token prediction is declared but incomplete; the model is read without it")
        # Some tools count the layers that they left out, some do not.
        is_counted = bool(found) or not keys.has_tensor(f"blk.{num_blocks - 1}.attn_norm.weight")
        num_blocks -= num_mtp if is_counted else 0
        num_mtp = 0
    if num_mtp >= num_blocks or num_blocks < 1:
        raise keys.error(keys.full("block_count"), f"{num_blocks} with {num_mtp} layers of multi-token prediction")
    return num_blocks - num_mtp, num_mtp


def _layer_types(keys: _ArchitectureKeys, num_layers: int) -> tuple[str, ...]:
    if keys.name != "qwen3next":
        return (FULL_ATTENTION,) * num_layers
    linear = keys.file.keys.get(keys.full("attention.recurrent_layers"))
    if isinstance(linear, list):
        is_list = len(linear) >= num_layers and all(item in (0, 1) for item in linear)
        if not is_list or any(linear[num_layers:]):
            raise keys.error(keys.full("attention.recurrent_layers"), f"must hold {num_layers} truth values")
        return tuple(LINEAR_ATTENTION if is_linear else FULL_ATTENTION for is_linear in linear[:num_layers])
    if keys.has("full_attention_interval"):
        interval = keys.integer("full_attention_interval")
        if interval < 1:
            raise keys.error(keys.full("full_attention_interval"), f"must be at least 1, not {interval}")
        return hybrid_pattern(num_layers, interval=interval)
    return tuple(
        LINEAR_ATTENTION
        if keys.has_tensor(f"blk.{i}.ssm_out.weight")
        else FULL_ATTENTION
        if keys.has_tensor(f"blk.{i}.attn_output.weight")
        else kind
        for i, kind in enumerate(hybrid_pattern(num_layers, interval=_INTERVAL))
    )


def _rotary_share(rotary_dim: int, head_dim: int) -> float:
    """The factor from which ModelConfig computes exactly `rotary_dim` again."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else (rotary_dim + 0.5) / head_dim


def _rope_scaling(keys: _ArchitectureKeys) -> YarnScaling | None:
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", 0.0)
    if kind == "none" or (kind in ("linear", "yarn") and factor in (0.0, 1.0)):
        return None
    if kind != "yarn":
        raise keys.unsupported("rope.scaling.type", f"{str(kind)[:60]!r} is not supported, only 'yarn'")
    try:
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=keys.integer(
                "rope.scaling.original_context_length", keys.integer("context_length")
            ),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    except ConfigError as error:
        raise error if str(error).startswith(str(keys.file.path)) else keys.error("rope.scaling", str(error)) from None


def _eos_token_id(keys: _ArchitectureKeys, num_tokens: int) -> int | tuple[int, ...] | None:
    first = keys.token("tokenizer.ggml.eos_token_id", num_tokens)
    if first is None or not keys.has("qnext.eos_token_ids"):
        return first
    ids = keys.file.keys["qnext.eos_token_ids"]
    if not isinstance(ids, list) or not ids or any(type(item) is not int for item in ids) or ids[0] != first:
        raise keys.error("qnext.eos_token_ids", "contradicts tokenizer.ggml.eos_token_id")
    return first if len(ids) == 1 else tuple(ids)  # type: ignore[arg-type]
