"""Typed values out of one JSON object: null is absent, and a whole number may be written 4096.0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from qnext.config.families import LINEAR_KEYS, SWITCH_KEYS
from qnext.errors import ConfigError, NotSupported

TOO_LARGE = 2**53
INTEGERS = frozenset(
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
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "num_nextn_predict_layers",
        "mtp_num_hidden_layers",
        "bos_token_id",
        "pad_token_id",
        "original_max_position_embeddings",
        "sliding_window",
        "max_window_layers",
    ]
) | frozenset(LINEAR_KEYS)
_NUMBERS = frozenset(
    ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range", "router_aux_loss_coef")
)
_BOOLEANS = frozenset(
    ("attention_bias", "tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "truncate", *SWITCH_KEYS)
)


class ConfigReader:
    """Reads values by key. What is absent is looked up in `defaults`, a later one after an earlier one."""

    def __init__(self, values: dict[str, Any], file: str, *defaults: Mapping[str, Any]) -> None:
        self.values = values
        self.file = file
        self.defaults = defaults

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: {one_line(key)}: {problem}")

    def not_supported(self, key: str, value: Any, reason: str) -> NotSupported:
        return NotSupported(f"{self.file}: {one_line(key)}: {shorten(value)} is not supported; {reason}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """The value of the file, else the first default there is; ConfigError where there is none."""
        if self.has(key):
            return self.check_type(key, self.values[key])
        for defaults in self.defaults:
            if defaults.get(key) is not None:
                return defaults[key]
        raise self.error(key, "missing")

    def get_or(self, key: str, default: Any) -> Any:
        """The value of the file, else `default`."""
        return self.get(key) if self.has(key) else default

    def check_type(self, key: str, value: Any, *, name: str | None = None) -> Any:
        """`value` as the type that `key` has; `name` is what a message calls it."""
        name = name or key
        if key in INTEGERS:
            whole = as_integer(value)
            if whole is None:
                raise self.error(name, f"must be an integer, not {shorten(value)}")
            if abs(whole) >= TOO_LARGE:
                raise self.error(name, f"is out of range: {shorten(value)}")
            return whole
        if key in _BOOLEANS and not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {shorten(value)}")
        if key in _NUMBERS:
            if not is_finite_number(value):
                raise self.error(name, f"must be a finite number, not {shorten(value)}")
            return float(value)
        return value


def as_integer(value: Any) -> int | None:
    """A whole number, also one written as a float; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_finite_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def one_line(text: str) -> str:
    """A key or a name as a message may show it, whatever the file says."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:80])


def shorten(value: Any) -> str:
    """A value as a message shows it: at most 60 characters."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return repr(value)[:60]


def listed(names: Iterable[str], *, most: int = 20) -> str:
    """Names in one line, the first `most` of them."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + more
