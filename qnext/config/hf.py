"""ModelConfig from and to Hugging Face's config.json.

Reading is liberal where the meaning is certain, writing is strict. An absent key means what the reference
implementation takes for the family (families.py), unless the tensors of the folder say otherwise. Keys without effect
are ignored (keys.py). Unknown keys are named in a warning. A contradiction is a ConfigError. A value that would change
the arithmetic and is not implemented is NotSupported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnext.config import keys
from qnext.config.bounded import read_bounded, repeated_key
from qnext.config.families import (
    ARCHITECTURES,
    COMMON_KEYS,
    EXPERT_KEYS,
    FAMILIES,
    LINEAR_KEYS,
    MTP_KEYS,
    SWITCH_KEYS,
    Family,
)
from qnext.config.model import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, YarnScaling, hybrid_pattern
from qnext.config.reader import ConfigReader, listed, shorten
from qnext.config.rope import read_rope
from qnext.errors import ConfigError, ModelNotFound, NotSupported, warn

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_LAYERS = 10_000  # a larger number is damage, and its layer list would fill the memory
# Where a wrapper of several modalities keeps its language model, and what it says of that outside the block.
_TEXT_BLOCKS = ("text_config", "llm_config", "language_config")
_OF_WRAPPER = ("tie_word_embeddings", *_TOKENS)
_SHARDED = "FSDP"  # what FSDP's wrapper writes before the name of a class
_LFS_POINTER = b"version https://git-lfs"


def load_config_json(path: Path) -> Any:
    """The JSON of a config.json in which no key appears twice. Raises ModelNotFound and ConfigError."""
    if not path.is_file():
        raise ModelNotFound(f"{path.parent}: no config.json there")
    try:
        content = read_bounded(path)
        if content.startswith(_LFS_POINTER):
            raise ConfigError(f"{path}: is a pointer of git-lfs; `git lfs pull` in its folder gets the file")
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    except RecursionError:
        raise ConfigError(f"{path}: not readable as JSON (nested too deeply)") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{repeated_key(pairs)} is given twice")
    return values


def from_hf(
    values: Any,
    *,
    file: str = "config.json",
    has_mtp: bool = False,
    tensors_say: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Read the content of a config.json, with old flat keys or with `rope_parameters`.

    `has_mtp` says whether the checkpoint holds MTP tensors. It decides only where the file says nothing, as in the
    released files. `tensors_say` holds sizes that the tensors show, by their key. They apply where the file leaves a
    key out; for the rows of the embedding and a separate head they also overrule the file. Raises ConfigError with file
    and key for a contradiction, NotSupported for a family or a value that is not implemented. Warns once of all unknown
    keys.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold a JSON object")
    model_type, values = _language_model(values, file)
    family, found = FAMILIES[model_type], dict(tensors_say or {})
    reader = ConfigReader(values, file, found, family.defaults)
    _check_keys(reader, model_type)
    layer_types = _layer_types(reader, model_type)
    fields: dict[str, Any] = _sizes(reader, model_type, found)
    fields.update(read_rope(reader))
    if LINEAR_ATTENTION in layer_types:
        fields.update({key: reader.get(key) for key in LINEAR_KEYS})
    elif family.is_hybrid:
        fields.update({key: reader.get_or(key, 0) for key in LINEAR_KEYS})
    fields.update(_feed_forward(reader, family, layer_types))
    fields.update(_switches(reader, model_type))
    fields.update({key: _token_ids(reader, key, fields["vocab_size"]) for key in _TOKENS})
    fields["num_nextn_predict_layers"] = _num_mtp_layers(reader, family, has_mtp)
    for key in ("initializer_range", "router_aux_loss_coef"):
        if reader.has(key):
            fields[key] = reader.get(key)
    try:
        config = ModelConfig(layer_types=layer_types, **fields)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    _check_windows(reader, model_type, config)
    return config


def is_wrapped(values: Any) -> bool:
    """Whether a config.json describes a multimodal model that contains a language model of these families."""
    return _text_block(values) is not None


def says_tied(values: Any) -> bool:
    """Whether a config.json says that the embedding is the head."""
    block = _text_block(values) or {}
    found = [source.get("tie_word_embeddings") for source in (block, values) if isinstance(source, dict)]
    return next((value is True for value in found if value is not None), False)


def _text_block(values: Any) -> dict[str, Any] | None:
    blocks = (values.get(key) for key in _TEXT_BLOCKS) if isinstance(values, dict) else ()
    for block in blocks:
        if isinstance(block, dict) and block:
            model_type = block.get("model_type", values.get("model_type"))
            if isinstance(model_type, str) and model_type in FAMILIES:
                return block
    return None


def _language_model(values: dict[str, Any], file: str) -> tuple[str, dict[str, Any]]:
    """(model_type, the keys that describe the language model). Raises NotSupported for another family."""
    block = _text_block(values)
    if block is not None:
        is_family = values.get("model_type") in FAMILIES
        outer = values if is_family else {key: values[key] for key in _OF_WRAPPER if values.get(key) is not None}
        merged = {**outer, **{key: value for key, value in block.items() if value is not None}}
        return str(merged["model_type"]), merged
    reader = ConfigReader(values, file)
    named = values.get("architectures")
    named = [named] if isinstance(named, str) else named or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise reader.error("architectures", f"must be a list of names, not {shorten(named)}")
    named = [name.removeprefix(_SHARDED) for name in named]
    families = [key for key, family in FAMILIES.items() if {family.architecture, family.base} & set(named)]
    if not reader.has("model_type"):
        if not families:
            raise reader.error("model_type", "missing")
        return families[0], values
    model_type = values["model_type"]
    supported = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items() if family.defaults)
    if not isinstance(model_type, str):
        raise reader.error("model_type", f"must be a name, not {shorten(model_type)}")
    if model_type not in FAMILIES:
        raise reader.not_supported("model_type", model_type, f"supported are {supported}")
    if named and model_type not in families:
        raise reader.not_supported("architectures", named[0], f"{model_type} is {ARCHITECTURES[model_type]}")
    return model_type, values


def _check_keys(reader: ConfigReader, model_type: str) -> None:
    """Refuses values that would change the arithmetic, warns of those without effect and of unknown keys."""
    family = FAMILIES[model_type]
    known = family.keys | (set(SWITCH_KEYS) if model_type == "qnext" else set())
    neutral = {**keys.NEUTRAL, **(keys.NEUTRAL_IN_HYBRID if family.is_hybrid else keys.NEUTRAL_ELSEWHERE)}
    unknown, unused = [], []
    for key, value in reader.values.items():
        if key in known or key in keys.WITHOUT_EFFECT or key in MTP_KEYS or key == "use_sliding_window":
            continue
        if key in neutral:
            if not keys.is_neutral(value, neutral[key]):
                reason = keys.REASONS.get(key, _only(neutral[key]))
                raise reader.not_supported(key, value, reason)
        elif key in keys.UNUSED:
            allowed, why = keys.UNUSED[key]
            if not keys.is_unused(value, allowed):
                unused.append((key, why))
        elif value is not None:
            unknown.append(key)
    for key, why in unused:
        warn(f"{reader.file}: {key} {why}")
    if unknown:
        warn(f"{reader.file}: unknown key{'s' if len(unknown) > 1 else ''} {listed(unknown)}, ignored")
    _rename_experts(reader)


def _only(allowed: tuple[Any, ...]) -> str:
    return f"only {' or '.join(map(repr, allowed))} is" if allowed else "only null is"


def _rename_experts(reader: ConfigReader) -> None:
    if not reader.has("num_local_experts"):
        return
    count = reader.get("num_local_experts")
    if reader.has("num_experts") and reader.get("num_experts") != count:
        raise reader.error("num_local_experts", "contradicts num_experts")
    reader.values = {**reader.values, "num_experts": count}


def _layer_types(reader: ConfigReader, model_type: str) -> tuple[str, ...]:
    num_layers = reader.get("num_hidden_layers")
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise reader.error("num_hidden_layers", f"must lie between 1 and {_MAX_LAYERS}, not {num_layers}")
    is_hybrid = FAMILIES[model_type].is_hybrid
    if not is_hybrid and not reader.has("layer_types"):
        return (FULL_ATTENTION,) * num_layers
    from_interval = None
    if is_hybrid and reader.has("full_attention_interval"):
        from_interval = _every(reader, num_layers)
    if reader.has("layer_types"):
        named = reader.get("layer_types")
        if not isinstance(named, list) or len(named) != num_layers:
            raise reader.error("layer_types", f"must list {num_layers} layers, as num_hidden_layers says")
        if "sliding_attention" in named or "chunked_attention" in named:
            raise reader.not_supported("layer_types", "sliding_attention", "full and linear attention are")
        if from_interval is not None and tuple(named) != from_interval:
            raise reader.error("layer_types", "contradicts full_attention_interval")
        return tuple(named)
    if from_interval is not None:
        return from_interval
    for defaults in reader.defaults:
        if "layer_types" in defaults:  # the names of the tensors
            return tuple(defaults["layer_types"])
        if "full_attention_interval" in defaults:
            return _every(reader, num_layers)
    raise reader.error("layer_types", "missing, and full_attention_interval too")


def _every(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    interval = reader.get("full_attention_interval")
    if interval < 1:
        raise reader.error("full_attention_interval", f"must be at least 1, not {interval}")
    return hybrid_pattern(num_layers, interval=interval)


def _check_windows(reader: ConfigReader, model_type: str, config: ModelConfig) -> None:
    """Attention over a window is not implemented. Several spellings say that there is none."""
    if not reader.get_or("use_sliding_window", False):
        return
    window = reader.get_or("sliding_window", None)
    first = reader.get_or("max_window_layers", None)
    is_beyond = model_type == "qwen3" and first is not None and first >= config.num_hidden_layers
    is_none = window is None and "sliding_window" in reader.values
    is_whole = window is not None and window >= config.context_length
    if not (is_beyond or is_none or is_whole):
        raise reader.not_supported("use_sliding_window", True, "every layer must see the whole context")


def _sizes(reader: ConfigReader, model_type: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The common fields. The tensors have the last word on the vocabulary and on a head of its own."""
    fields: dict[str, Any] = {}
    for key in COMMON_KEYS:
        is_open = not reader.has(key) and not any(key in defaults for defaults in reader.defaults)
        if key == "head_dim" and is_open and model_type != "qnext" and fields["num_attention_heads"] > 0:
            fields[key] = fields["hidden_size"] // fields["num_attention_heads"]
            continue
        is_null = key in reader.values and not reader.has(key)
        if key == "num_key_value_heads" and is_null and key not in found and model_type == "qwen3":
            fields[key] = fields["num_attention_heads"]
            continue
        fields[key] = reader.get(key)
    rows = found.get("vocab_size", fields["vocab_size"])
    if rows != fields["vocab_size"]:
        warn(f"{reader.file}: vocab_size is {fields['vocab_size']}, but the embedding has {rows} rows, which count")
        fields["vocab_size"] = rows
    if fields["tie_word_embeddings"] and found.get("tie_word_embeddings") is False:
        warn(f"{reader.file}: tie_word_embeddings is true, but lm_head.weight differs from the embedding and is used")
        fields["tie_word_embeddings"] = False
    if not reader.has("tie_word_embeddings") and found.get("tie_word_embeddings"):
        warn(f"{reader.file}: tie_word_embeddings is missing, and there is no lm_head.weight: the embedding serves")
    return fields


def _feed_forward(reader: ConfigReader, family: Family, layer_types: tuple[str, ...]) -> dict[str, Any]:
    if not family.has_experts:
        return {"intermediate_size": reader.get("intermediate_size")}
    fields: dict[str, Any] = {key: reader.get(key) for key in EXPERT_KEYS}
    if fields["num_experts"] < 1 and family.defaults:
        raise reader.error("num_experts", f"must be at least 1, not {fields['num_experts']}")
    layers = fields["mlp_only_layers"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise reader.error("mlp_only_layers", f"must be a list of layer numbers, not {shorten(layers)}")
    fields["mlp_only_layers"] = tuple(layers)
    if family.is_hybrid:
        fields["shared_expert_intermediate_size"] = reader.get("shared_expert_intermediate_size")
    fields["intermediate_size"] = reader.get("intermediate_size") if family.defaults else 0
    if reader.has("intermediate_size"):
        fields["intermediate_size"] = reader.get("intermediate_size")
    return fields


def _switches(reader: ConfigReader, model_type: str) -> dict[str, bool]:
    if model_type == "qnext":
        return {key: reader.get(key) for key in SWITCH_KEYS}
    is_next = model_type == "qwen3_next"
    return {"attention_output_gate": is_next, "zero_centered_norm": is_next}


def _token_ids(reader: ConfigReader, key: str, vocab_size: int) -> int | tuple[int, ...] | None:
    """Ids as the file gives them; one that is -1 is none, and one outside the vocabulary can never occur."""
    if not reader.has(key):
        return None
    value = reader.values[key]
    is_list = key == "eos_token_id" and isinstance(value, list)
    ids = [reader.check_type("pad_token_id", token, name=key) for token in (value if is_list else [value])]
    if any(token < -1 for token in ids):
        raise reader.error(key, f"must be an id, not {shorten(value)}")
    outside = [token for token in ids if token >= vocab_size]
    if outside:
        warn(f"{reader.file}: {key} {outside[0]} is outside the vocabulary of {vocab_size} and is ignored")
    kept = tuple(token for token in ids if 0 <= token < vocab_size)
    if is_list:
        return kept or None
    return kept[0] if kept else None


def _num_mtp_layers(reader: ConfigReader, family: Family, has_mtp: bool) -> int:
    counts = {key: reader.check_type(key, reader.values[key]) for key in MTP_KEYS if reader.has(key)}
    if len(set(counts.values())) > 1:
        raise reader.error("mtp_num_hidden_layers", "contradicts num_nextn_predict_layers")
    for key, count in counts.items():
        if count < 0:
            raise reader.error(key, f"must not be negative, but is {count}")
        if count and not (family.is_hybrid and count == 1):
            kind = "one layer of Qwen3-Next" if family.is_hybrid else "Qwen3-Next's"
            message = f"{reader.file}: {key} is {count}: only {kind} drafts tokens; the model runs without drafts"
            warn(message, error=NotSupported)
            return 0
        return int(count)
    return int(has_mtp and family.is_hybrid)


def hf_model_type(config: ModelConfig) -> str:
    """The Hugging Face family that computes exactly this; `qnext` where no family does (ablations)."""
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

    Only sizes of parts that the model does not have may be lost, where their family's file has no key for them. Rotary
    keys are written flat and, with YaRN, as `rope_scaling`: every known reader accepts this form.
    """
    model_type = hf_model_type(config)
    keys: tuple[str, ...] = (
        *COMMON_KEYS,
        "initializer_range",
        "router_aux_loss_coef",
        "intermediate_size",
        "rope_theta",
    )
    if model_type in ("qwen3_next", "qnext"):
        keys += (*EXPERT_KEYS, "shared_expert_intermediate_size", "partial_rotary_factor", "num_nextn_predict_layers")
        keys += LINEAR_KEYS
    if model_type == "qwen3_moe":
        keys += EXPERT_KEYS
    if model_type == "qnext":
        keys += SWITCH_KEYS
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
