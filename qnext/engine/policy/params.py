"""How tokens are chosen: every parameter of a request, checked. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from qnext.engine.policy.watermark_key import WatermarkKey
from qnext.errors import UsageError

MAX_LISTED_TOKENS = 1024
MAX_LOGPROBS = 1024
MAX_PROMPT_LOGPROBS = 20
MAX_COMPLETIONS = 128
# What arithmetic in fp32 takes with any logits: OpenAI's ranges where it has the field, else within vLLM's. The server
# takes the same, but for temperatures: those of each API.
MAX_TEMPERATURE = 100.0
GREEDY_BELOW = 1e-5  # temperatures below are 0, as in vLLM: the draw would be the argmax, or a tie
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
MAX_PENALTY = 2.0  # presence and frequency, to both sides
MAX_BIAS = 100.0  # to both sides
MAX_TOP_K = 1_000_000_000
MAX_TOKENS = 2**31
_MAX_SHOWN = 40  # characters of a value in a message

_INTEGERS = ("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "n")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_COUNTS = {
    "max_tokens": (1, MAX_TOKENS),
    "min_tokens": (0, MAX_TOKENS),
    "n": (1, MAX_COMPLETIONS),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_PROMPT_LOGPROBS),
}
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Raises UsageError naming the field for a value that is not finite or out of range.

    Tokens that may not be chosen go first, then `logit_bias` is added, then penalties apply. Filters apply to the
    temperature-scaled distribution in the order min_p, top_k, top_p; tokens that tie with the last one kept are kept
    too.
    """

    temperature: float = 0.0
    """0, or below 1e-5, is greedy: the exact argmax."""

    top_k: int = 0
    """0 or -1: off."""

    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Counts tokens of prompt and output."""

    presence_penalty: float = 0.0
    """Counts tokens of the output only."""

    frequency_penalty: float = 0.0
    """Counts tokens of the output only."""

    seed: int | None = None
    """None: the engine draws one."""

    max_tokens: int | None = None
    """None: as many as the context holds."""

    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives are reported beside each token of the answer."""

    min_tokens: int = 0
    """Before so many tokens, none is chosen that would end the answer."""

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    """None: all."""

    banned_token_ids: tuple[int, ...] = ()
    """Never chosen, whatever is allowed."""

    prompt_logprobs: int | None = None
    """How many alternatives are reported beside each token of the prompt."""

    watermark: WatermarkKey | None = None
    """Marks the answer, so that who has the key can tell it from other texts (docs/guide/watermark.md)."""

    n: int = 1
    """Completions that are asked for: see Engine.add_requests."""

    def __post_init__(self) -> None:
        for name in (*_FLOATS, *_INTEGERS):
            _check_number(name, getattr(self, name))
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos must be true or false, not {_shown(self.ignore_eos)}")
        _require(self, "temperature", 0 <= self.temperature <= MAX_TEMPERATURE, f"in [0, {MAX_TEMPERATURE:g}]")
        _require(self, "top_k", -1 <= self.top_k <= MAX_TOP_K, f"between 1 and {MAX_TOP_K}, or 0 for off")
        _require(self, "top_p", 0 < self.top_p <= 1, "in (0, 1]")
        _require(self, "min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        least, most = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        _require(self, "repetition_penalty", least <= self.repetition_penalty <= most, f"in [{least:g}, {most:g}]")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(self, name, abs(getattr(self, name)) <= MAX_PENALTY, f"in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]")
        _require(self, "seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        for name, (low, high) in _COUNTS.items():
            value = getattr(self, name)
            _require(self, name, value is None or low <= value <= high, f"between {low} and {high}")
        for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            object.__setattr__(self, name, _checked_ids(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        self._check_together()

    def _check_together(self) -> None:
        if not isinstance(self.watermark, (WatermarkKey, type(None))):
            raise UsageError("watermark must be a WatermarkKey or None")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise UsageError("allowed_token_ids must name at least one token")
            if not set(self.allowed_token_ids).difference(self.banned_token_ids):
                raise UsageError("banned_token_ids leaves nothing of allowed_token_ids")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def takes_likeliest(self) -> bool:
        """Whether tokens from number `min_tokens` on are the likeliest by the raw logits, and no more is told."""
        chooses = self.logit_bias or self.banned_token_ids or self.allowed_token_ids is not None or self.has_penalties
        return self.is_greedy and not chooses and self.logprobs is None and not self.is_marked

    @property
    def is_marked(self) -> bool:
        """Whether a watermark changes what is drawn. A tournament among one candidate changes nothing."""
        return self.watermark is not None and (not self.is_greedy or self.watermark.scheme == "green")

    def check_vocabulary(self, *, vocab_size: int, stop_ids: Collection[int]) -> None:
        """Raise UsageError for listed tokens outside the vocabulary, and when no token could be chosen at some point.

        `stop_ids` are all tokens that end the request. Those outside the vocabulary are ignored.
        """
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise UsageError(f"{name}: token {_shown(token)} is outside the vocabulary of {vocab_size}")
        if self._num_usable(vocab_size, ()) == 0:
            raise UsageError("banned_token_ids leaves no token of the vocabulary")
        if self.min_tokens and self._num_usable(vocab_size, stop_ids) == 0:
            raise UsageError(f"min_tokens {self.min_tokens}: every token that may be chosen would end the answer")

    def _num_usable(self, vocab_size: int, excluded: Collection[int]) -> int:
        out = set(self.banned_token_ids).union(excluded)
        if self.allowed_token_ids is not None:
            return len(set(self.allowed_token_ids) - out)
        return vocab_size - sum(token < vocab_size for token in out)


def _check_number(name: str, value: object) -> None:
    if value is None and name in _OPTIONAL:
        return
    kinds: tuple[type, ...] = (int,) if name in _INTEGERS else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UsageError(f"{name} must be {'an integer' if name in _INTEGERS else 'a number'}, not {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} must be finite, not {value}")


def _require(params: SamplingParams, name: str, is_valid: bool, rule: str) -> None:
    if not is_valid:
        raise UsageError(f"{name} must be {rule}, not {_shown(getattr(params, name))}")


def _shown(value: object) -> str:
    """A value for a message; what is long, or cannot be written in decimal, by its beginning or kind."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_ids(name: str, values: object) -> tuple[int, ...] | None:
    if values is None and name == "allowed_token_ids":
        return None
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise UsageError(f"{name} must be a list of token ids, not {_shown(values)}")
    ids = tuple(values)
    if len(ids) > MAX_LISTED_TOKENS:
        raise UsageError(f"{name} must name at most {MAX_LISTED_TOKENS} tokens, not {len(ids)}")
    for token in ids:
        if not _is_token(token):
            raise UsageError(f"{name} must be token ids, not {_shown(token)}")
    return ids


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias must map token ids to numbers, not {_shown(bias)}")
    if len(bias) > MAX_LISTED_TOKENS:
        raise UsageError(f"logit_bias must name at most {MAX_LISTED_TOKENS} tokens, not {len(bias)}")
    for token, value in bias.items():
        if not _is_token(token):
            raise UsageError(f"logit_bias must have token ids as keys, not {_shown(token)}")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_BIAS:
            most = f"{MAX_BIAS:g}"
            raise UsageError(
                f"logit_bias of token {_shown(token)} must be a number in [-{most}, {most}], not {_shown(value)}"
            )
    return dict(bias)
