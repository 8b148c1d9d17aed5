"""ModelConfig from and to Hugging Face's config.json, strictly: nothing is guessed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qnext.config.model import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, YarnScaling, hybrid_pattern
from qnext.errors import ConfigError, ModelNotFound

ARCHITECTURES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qnext": "QnextForCausalLM",
}

# Keys that say nothing about the arithmetic; those of a quantisation are read by the checkpoint loader.
_IGNORED = frozenset((
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_router_logits",
    "quantization_config", "quantization", "compression_config", "_name_or_path", "name_or_path", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder",
    "problem_type", "id2label", "label2id", "finetuning_task", "torchscript", "tokenizer_class", "prefix",
    "task_specific_params", "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "pruned_heads",
    "decoder_start_token_id", "sep_token_id", "_attn_implementation", "_attn_implementation_internal",
    "attn_implementation", "unsloth_fixed", "unsloth_version",
))  # fmt: skip
# Keys whose only supported value is given; another value changes the arithmetic.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, 0),
    "use_sliding_window": (False, None),
}
_SLIDING = ("sliding_window", "max_window_layers")
_COMMON = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
           "max_position_embeddings", "rms_norm_eps", "attention_bias", "tie_word_embeddings")  # fmt: skip
_LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
           "linear_conv_kernel_dim")  # fmt: skip
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
            "mlp_only_layers")  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SWITCHES = ("attention_output_gate", "zero_centered_norm", "mtp_uses_final_norm")
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_PATTERN = ("num_hidden_layers", "layer_types")
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_OPTIONAL = ("initializer_range", "router_aux_loss_coef", "intermediate_size")

_INTEGERS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "num_hidden_layers",
        "full_attention_interval",
        "intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "num_nextn_predict_layers",
        "mtp_num_hidden_layers",
        "bos_token_id",
        "pad_token_id",
    ]
) | frozenset(_LINEAR)
_NUMBERS = frozenset(
    ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range", "router_aux_loss_coef")
)
_TOO_LARGE = 2**53
_MAX_LAYERS = 10_000  # a larger number is damage, and its layer list would fill the memory
_BOOLEANS = frozenset(("attention_bias", "tie_word_embeddings", "norm_topk_prob", *_SWITCHES))


class _Reader:
    """Reads typed values from one JSON object and remembers which keys were read."""

    def __init__(self, values: dict[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: {key}: {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        if not self.has(key):
            raise self.error(key, "missing")
        return self.check_type(key, self.values[key])

    def get_or(self, key: str, default: Any) -> Any:
        return self.get(key) if self.has(key) else default

    def check_type(self, key: str, value: Any) -> Any:
        if key in _INTEGERS and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.error(key, f"must be an integer, not {value!r}")
        if key in _INTEGERS and abs(value) >= _TOO_LARGE:
            raise self.error(key, f"is out of range: {value!r}")
        if key in _BOOLEANS and not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        if key in _NUMBERS:
            if not _is_finite_number(value):
                raise self.error(key, f"must be a finite number, not {value!r}")
            return float(value)
        return value


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def read_config(folder: str | Path, *, has_mtp: bool = False) -> ModelConfig:
    """The configuration of a model folder. `has_mtp`: see from_hf."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{path.parent}: no config.json there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    except RecursionError:
        raise ConfigError(f"{path}: not readable as JSON (nested too deeply)") from None
    return from_hf(values, file=str(path), has_mtp=has_mtp)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{repeated} is given twice")
    return values


def from_hf(values: Any, *, file: str = "config.json", has_mtp: bool = False) -> ModelConfig:
    """Read the content of a config.json, old flat keys and `rope_parameters` alike.

    `has_mtp` says whether the checkpoint holds MTP tensors; it decides only where the file is silent, as the
    released ones are. Raises ConfigError with file and key for a value that is unknown, missing or contradictory.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold a JSON object")
    reader = _Reader(values, file)
    model_type = reader.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise reader.error("model_type", f"{model_type!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    _refuse_unknown(reader, model_type)
    layer_types = _layer_types(reader, model_type)
    fields: dict[str, Any] = {key: reader.get(key) for key in _COMMON}
    fields.update(_rope(reader, model_type))
    if LINEAR_ATTENTION in layer_types:
        fields.update({key: reader.get(key) for key in _LINEAR})
    elif model_type in ("qwen3_next", "qnext"):
        fields.update({key: reader.get_or(key, 0) for key in _LINEAR})
    fields.update(_feed_forward(reader, model_type))
    fields.update(_switches(reader, model_type))
    fields.update({key: _token_ids(reader, key) for key in _TOKENS})
    fields["num_nextn_predict_layers"] = _num_mtp_layers(reader, model_type, has_mtp)
    for key in ("initializer_range", "router_aux_loss_coef"):
        if reader.has(key):
            fields[key] = reader.get(key)
    try:
        return ModelConfig(layer_types=layer_types, **fields)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _refuse_unknown(reader: _Reader, model_type: str) -> None:
    known = {"model_type", *_COMMON, *_ROPE, *_PATTERN, *_TOKENS, *_OPTIONAL, *_FIXED, *_SLIDING}
    if model_type in ("qwen3_next", "qnext"):
        known |= {"full_attention_interval", *_LINEAR, *_EXPERTS, "shared_expert_intermediate_size", *_MTP}
    if model_type == "qnext":
        known |= set(_SWITCHES)
    if model_type == "qwen3_moe":
        known |= {*_EXPERTS, "num_local_experts"}
    for key, value in reader.values.items():
        if key not in known and key not in _IGNORED:
            raise reader.error(key, f"unknown key (value {str(value)[:60]!r})")
    for key, allowed in _FIXED.items():
        if key in reader.values and reader.values[key] not in allowed:
            raise reader.error(key, f"{reader.values[key]!r} is not supported, only {allowed[0]!r}")
    if reader.has("num_local_experts") and reader.has("num_experts"):
        if reader.values["num_local_experts"] != reader.values["num_experts"]:
            raise reader.error("num_local_experts", "contradicts num_experts")
    elif reader.has("num_local_experts"):
        reader.values = {**reader.values, "num_experts": reader.values["num_local_experts"]}


def _layer_types(reader: _Reader, model_type: str) -> tuple[str, ...]:
    num_layers = reader.get("num_hidden_layers")
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise reader.error("num_hidden_layers", f"must lie between 1 and {_MAX_LAYERS}, not {num_layers}")
    from_interval = None
    if model_type in ("qwen3_next", "qnext") and reader.has("full_attention_interval"):
        interval = reader.get("full_attention_interval")
        if interval < 1:
            raise reader.error("full_attention_interval", f"must be at least 1, not {interval}")
        from_interval = hybrid_pattern(num_layers, interval=interval)
    if reader.has("layer_types"):
        named = reader.get("layer_types")
        if not isinstance(named, list) or len(named) != num_layers:
            raise reader.error("layer_types", f"must list {num_layers} layers, as num_hidden_layers says")
        if from_interval is not None and tuple(named) != from_interval:
            raise reader.error("layer_types", "contradicts full_attention_interval")
        return tuple(named)
    if from_interval is not None:
        return from_interval
    if model_type in ("qwen3_next", "qnext"):
        raise reader.error("layer_types", "missing, and full_attention_interval too")
    return (FULL_ATTENTION,) * num_layers


def _rope(reader: _Reader, model_type: str) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not reader.has(key):
            continue
        block = reader.get(key)
        if not isinstance(block, dict):
            raise reader.error(key, f"must be an object or null, not {block!r}")
        for name, value in block.items():
            if name in nested and nested[name] != value:
                raise reader.error(f"{key}.{name}", "contradicts rope_scaling")
            nested[name] = value
    found: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in nested:
            value = reader.check_type(key, nested.pop(key))
            if reader.has(key) and reader.get(key) != value:
                raise reader.error(key, "contradicts rope_parameters")
            found[key] = value
        elif reader.has(key):
            found[key] = reader.get(key)
        elif key == "rope_theta" or model_type in ("qwen3_next", "qnext"):
            raise reader.error(key, "missing")
    found["rope_scaling"] = _yarn(reader, nested)
    return found


def _yarn(reader: _Reader, nested: dict[str, Any]) -> YarnScaling | None:
    kinds = [nested.pop(key) for key in ("rope_type", "type") if key in nested]
    if any(kind != kinds[0] for kind in kinds):
        raise reader.error("rope_scaling.rope_type", f"contradicts type ({kinds[0]!r}, {kinds[1]!r})")
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn"):
        raise reader.error("rope_scaling.rope_type", f"{kind!r} is not supported, only 'default' and 'yarn'")
    known = () if kind == "default" else tuple(YarnScaling.__dataclass_fields__)
    for key, value in nested.items():
        if key not in known:
            raise reader.error(f"rope_scaling.{key}", f"unknown key for rope_type {kind!r}")
        wanted, is_right = _yarn_type(key, value)
        if not is_right:
            raise reader.error(f"rope_scaling.{key}", f"must be {wanted}, not {value!r}")
    if kind == "default":
        return None
    for key in ("factor", "original_max_position_embeddings"):
        if key not in nested:
            raise reader.error(f"rope_scaling.{key}", "missing")
    try:
        return YarnScaling(**nested)
    except ConfigError as error:
        raise ConfigError(f"{reader.file}: {error}") from None


def _yarn_type(key: str, value: Any) -> tuple[str, bool]:
    """What a value of `rope_scaling` must be, in words, and whether it is."""
    if key == "truncate":
        return "true or false", isinstance(value, bool)
    if key == "original_max_position_embeddings":
        return "an integer", type(value) is int and value < _TOO_LARGE
    return "a finite number", _is_finite_number(value) or (key == "attention_factor" and value is None)


def _feed_forward(reader: _Reader, model_type: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"intermediate_size": reader.get_or("intermediate_size", 0)}
    if model_type == "qwen3":
        fields["intermediate_size"] = reader.get("intermediate_size")
        return fields
    for key in _EXPERTS:
        fields[key] = reader.get(key)
    if fields["num_experts"] < 1 and model_type != "qnext":
        raise reader.error("num_experts", f"must be at least 1, not {fields['num_experts']}")
    layers = fields["mlp_only_layers"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise reader.error("mlp_only_layers", f"must be a list of layer numbers, not {layers!r}")
    fields["mlp_only_layers"] = tuple(layers)
    if model_type in ("qwen3_next", "qnext"):
        fields["shared_expert_intermediate_size"] = reader.get("shared_expert_intermediate_size")
    return fields


def _switches(reader: _Reader, model_type: str) -> dict[str, bool]:
    if model_type == "qnext":
        return {key: reader.get(key) for key in _SWITCHES}
    is_next = model_type == "qwen3_next"
    return {"attention_output_gate": is_next, "zero_centered_norm": is_next}


def _token_ids(reader: _Reader, key: str) -> int | tuple[int, ...] | None:
    if not reader.has(key):
        return None
    value = reader.get(key)
    if key == "eos_token_id" and isinstance(value, list):
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            raise reader.error(key, "must be an integer or a list of integers")
        return tuple(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise reader.error(key, f"must be an integer, not {value!r}")
    return value


def _num_mtp_layers(reader: _Reader, model_type: str, has_mtp: bool) -> int:
    counts = {key: reader.get(key) for key in _MTP if reader.has(key)}
    if len(set(counts.values())) > 1:
        raise reader.error("mtp_num_hidden_layers", "contradicts num_nextn_predict_layers")
    if counts:
        return int(next(iter(counts.values())))
    return int(has_mtp and model_type in ("qwen3_next", "qnext"))


def hf_model_type(config: ModelConfig) -> str:
    """The Hugging Face family that computes exactly this; `qnext` where none does (ablations)."""
    is_full_only = not config.has_linear_layers
    if config.attention_output_gate and config.zero_centered_norm:
        is_next = config.num_experts > 0 and config.shared_expert_intermediate_size > 0
        return "qwen3_next" if is_next and config.mtp_uses_final_norm else "qnext"
    is_plain = is_full_only and not config.attention_output_gate and not config.zero_centered_norm
    if not is_plain or config.num_nextn_predict_layers or config.shared_expert_intermediate_size:
        return "qnext"
    if config.partial_rotary_factor != 1.0:
        return "qnext"
    return "qwen3_moe" if config.num_experts else "qwen3"


def to_hf(config: ModelConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of a config.json that from_hf reads back to an equal ModelConfig.

    Only sizes of parts that the model does not have may be lost, where their family's file has no key for them.
    Rotary keys are written flat and, where YaRN is on, as `rope_scaling`: every reader known accepts this form.
    """
    model_type = hf_model_type(config)
    keys: tuple[str, ...] = (*_COMMON, *_OPTIONAL, "rope_theta")
    if model_type in ("qwen3_next", "qnext"):
        keys += (*_EXPERTS, "shared_expert_intermediate_size", "partial_rotary_factor", "num_nextn_predict_layers")
        keys += _LINEAR
    if model_type == "qwen3_moe":
        keys += _EXPERTS
    if model_type == "qnext":
        keys += _SWITCHES
    values: dict[str, Any] = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    values["num_hidden_layers"] = config.num_hidden_layers
    for key in keys:
        value = getattr(config, key)
        values[key] = list(value) if isinstance(value, tuple) else value
    if model_type in ("qwen3_next", "qnext"):
        values["layer_types"] = list(config.layer_types)
    values.update(hidden_act="silu", attention_dropout=0.0, use_sliding_window=False, use_cache=True, dtype=dtype)
    values["rope_scaling"] = _yarn_to_hf(config.rope_scaling)
    for key in _TOKENS:
        value = getattr(config, key)
        values[key] = list(value) if isinstance(value, tuple) else value
    return values


def _yarn_to_hf(scaling: YarnScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {name: getattr(scaling, name) for name in YarnScaling.__dataclass_fields__}
    return {"rope_type": "yarn", **{name: value for name, value in values.items() if value is not None}}
