"""Rotary positions of a config.json: flat keys, `rope_scaling` and `rope_parameters`.

The reference is transformers' modeling_rope_utils.py; `attn_factor`, `extrapolation_factor` and `apply_yarn_scaling`
are vLLM's.
"""

from __future__ import annotations

import math
from typing import Any

from qnext.config.model import FULL_ATTENTION, LINEAR_ATTENTION, YarnScaling
from qnext.config.reader import ConfigReader, as_integer, is_finite_number, listed, shorten
from qnext.errors import ConfigError, warn

# Positions of text are alike on every axis of mrope, which makes it the plain form.
PLAIN_KINDS = ("default", "mrope")
OTHER_KINDS = ("linear", "dynamic", "llama3", "longrope", "su", "proportional", "axial", "ntk")
_WITHOUT_EFFECT = frozenset(("mrope_section", "mrope_interleaved", "interleaved"))
_NEUTRAL = {"attn_factor": 1, "extrapolation_factor": 1, "apply_yarn_scaling": True}
_YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def read_rope(reader: ConfigReader) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor and rope_scaling of a ModelConfig."""
    nested = _nested(reader)
    found: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in nested:
            value = reader.check_type(key, nested.pop(key))
            if reader.has(key) and reader.get(key) != value:
                raise reader.error(key, "contradicts rope_parameters")
            found[key] = value
        else:
            found[key] = reader.get(key)
    found["rope_scaling"] = _scaling(reader, nested)
    return found


def _nested(reader: ConfigReader) -> dict[str, Any]:
    """The keys of both blocks; null is absent."""
    nested: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not reader.has(key):
            continue
        block = reader.values[key]
        if not isinstance(block, dict):
            raise reader.error(key, f"must be an object or null, not {shorten(block)}")
        if block and set(block) <= {FULL_ATTENTION, LINEAR_ATTENTION, "sliding_attention"}:
            block = block.get(FULL_ATTENTION) or {}  # by kind of layer; only full attention rotates
            if not isinstance(block, dict):
                raise reader.error(f"{key}.{FULL_ATTENTION}", f"must be an object or null, not {shorten(block)}")
        for name, value in block.items():
            if value is None:
                continue
            if name in nested and nested[name] != value:
                raise reader.error(f"{key}.{name}", "contradicts rope_scaling")
            nested[name] = value
    return nested


def _scaling(reader: ConfigReader, nested: dict[str, Any]) -> YarnScaling | None:
    kinds = [nested.pop(key) for key in ("rope_type", "type") if key in nested]
    if any(kind != kinds[0] for kind in kinds):
        raise reader.error("rope_scaling.rope_type", f"contradicts type ({shorten(kinds[0])}, {shorten(kinds[1])})")
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str):
        raise reader.error("rope_scaling.rope_type", f"must be a name, not {shorten(kind)}")
    if kind == "linear" and nested.get("factor") == 1:
        kind = "default"
        nested.pop("factor")
    if kind in OTHER_KINDS:
        raise reader.not_supported("rope_scaling.rope_type", kind, "supported are 'default' and 'yarn'")
    if kind not in (*PLAIN_KINDS, "yarn"):
        raise reader.not_supported("rope_scaling.rope_type", kind, "it is not known; supported are 'default', 'yarn'")
    for key, neutral in _NEUTRAL.items():
        value = nested.pop(key, neutral)
        if value != neutral:
            raise reader.not_supported(f"rope_scaling.{key}", value, f"only {neutral} is")
    yarn_keys = {*_YARN_NUMBERS, "original_max_position_embeddings", "truncate"} if kind == "yarn" else set()
    unknown = [key for key in nested if key not in yarn_keys and key not in _WITHOUT_EFFECT]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        warn(f"{reader.file}: rope_scaling of type {kind}: unknown key{plural} {listed(unknown)}, ignored")
    return _yarn(reader, nested) if kind == "yarn" else None


def _yarn(reader: ConfigReader, nested: dict[str, Any]) -> YarnScaling:
    for key in _YARN_NUMBERS:
        if key in nested and not is_finite_number(nested[key]):
            raise reader.error(f"rope_scaling.{key}", f"must be a finite number, not {shorten(nested[key])}")
    truncate = nested.get("truncate", True)
    if not isinstance(truncate, bool):
        raise reader.error("rope_scaling.truncate", f"must be true or false, not {shorten(truncate)}")
    original = _original_length(reader, nested)
    factor = nested.get("factor")
    if factor is None:
        factor = reader.get("max_position_embeddings") / original if original > 0 else 0
        if factor <= 1:
            raise reader.error("rope_scaling.factor", "missing")
    attention_factor = nested.get("attention_factor")
    mscale, of_all = nested.get("mscale"), nested.get("mscale_all_dim")
    if attention_factor is None and mscale and of_all and factor > 0:
        divisor = _magnitude(factor, of_all)
        if divisor <= 0:
            raise reader.error("rope_scaling.mscale_all_dim", f"is out of range: {shorten(of_all)}")
        attention_factor = _magnitude(factor, mscale) / divisor
    optional = {key: nested[key] for key in ("beta_fast", "beta_slow") if nested.get(key) is not None}
    try:
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=attention_factor,
            truncate=truncate,
            **optional,
        )
    except ConfigError as error:
        raise ConfigError(f"{reader.file}: {error}") from None


def _original_length(reader: ConfigReader, nested: dict[str, Any]) -> int:
    """Positions before stretching: of the block, else of the file, else today's number of them."""
    key = "original_max_position_embeddings"
    outer = reader.get_or(key, None)
    if key in nested:
        original = as_integer(nested[key])
        if original is None:
            raise reader.error(f"rope_scaling.{key}", f"must be an integer, not {shorten(nested[key])}")
        if outer is not None and outer != original:
            raise reader.error(key, f"contradicts rope_scaling.{key}")
        reader.check_type(key, original, name=f"rope_scaling.{key}")
        return original
    return int(reader.get("max_position_embeddings") if outer is None else outer)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
