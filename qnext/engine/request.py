"""What is asked of the engine, checked, and how far it has come. No torch."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from typing import Literal, NamedTuple

from qnext.engine.flights import Flight, Wait
from qnext.errors import DoesNotFit, UsageError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Raises UsageError naming the field for a value that is not finite or out of range.

    temperature 0 is greedy: the exact argmax. Filters apply to the temperature-scaled distribution in the order
    min_p, top_k, top_p; tokens that tie with the last one kept are kept too. The repetition penalty counts tokens of
    prompt and output, presence and frequency penalties those of the output only.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: the engine draws one
    max_tokens: int | None = None  # None: as many as the context holds
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report beside the chosen token

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_number(item.name, getattr(self, item.name))
        _require(self, "temperature", self.temperature >= 0, "at least 0")
        _require(self, "top_k", self.top_k >= -1, "at least 1, or 0 for off")
        _require(self, "top_p", 0 < self.top_p <= 1, "in (0, 1]")
        _require(self, "min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        _require(self, "repetition_penalty", self.repetition_penalty > 0, "positive")
        _require(self, "presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        _require(self, "frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        _require(self, "seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        _require(self, "max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        _require(self, "logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in self.stop_token_ids):
            raise UsageError(f"stop_token_ids must be token ids, not {list(self.stop_token_ids)}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_INTEGERS = ("top_k", "seed", "max_tokens", "logprobs")
_OPTIONAL = ("seed", "max_tokens", "logprobs")


def _check_number(name: str, value: object) -> None:
    if name in ("stop_token_ids", "ignore_eos") or (value is None and name in _OPTIONAL):
        return
    kinds: tuple[type, ...] = (int,) if name in _INTEGERS else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UsageError(f"{name} must be {'an integer' if name in _INTEGERS else 'a number'}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} must be finite, not {value}")


def _require(params: SamplingParams, name: str, is_valid: bool, rule: str) -> None:
    if not is_valid:
        raise UsageError(f"{name} must be {rule}, not {getattr(params, name)}")


class SampledToken(NamedTuple):
    """One chosen token. Log-probabilities are those of the raw logits, in nats, before penalties and temperature."""

    token_id: int
    logprob: float | None = None  # None unless asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence on its way. `num_computed_tokens` counts the tokens whose keys, values and state are in the cache.

    A stop token is the last of `output_ids` when `finish_reason` is "stop".
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]
    output_ids: list[int] = field(default_factory=list)
    sampled: list[SampledToken] = field(default_factory=list)  # only when logprobs are asked for
    num_computed_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    output_counts: Counter[int] = field(default_factory=Counter)
    salt: str = ""  # only requests of one salt share cached prefixes
    drafts: tuple[int, ...] = ()  # tokens that may follow the last one, to be verified in the next step
    num_cached_tokens: int | None = None  # of the prompt, found in the cache on admission
    flight: Flight | None = None  # its prompt on the way to the cache; the scheduler's
    wait: Wait | None = None  # for whom it waits; the scheduler's

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens that can ever lie in the cache: the last one chosen is never read back."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @cached_property
    def prompt_id_set(self) -> frozenset[int]:
        return frozenset(self.prompt_ids)

    def token_range(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens `start` to `end` of prompt and output together."""
        num_prompt = len(self.prompt_ids)
        head = self.prompt_ids[start:end]
        return head + tuple(self.output_ids[max(0, start - num_prompt) : max(0, end - num_prompt)])

    def append(self, token: SampledToken) -> FinishReason | None:
        """Add a chosen token; returns why the request ends with it, if it does."""
        self.output_ids.append(token.token_id)
        self.output_counts[token.token_id] += 1
        if self.params.logprobs is not None:
            self.sampled.append(token)
        if token.token_id in self.stop_ids:
            return "stop"
        return "length" if len(self.output_ids) >= self.max_tokens else None


def checked_prompt(prompt_ids: Sequence[int], *, vocab_size: int) -> tuple[int, ...]:
    """The prompt as a tuple. Raises UsageError when it is empty or holds what is no id of the vocabulary."""
    if not len(prompt_ids):
        raise UsageError("the prompt is empty")
    try:
        prompt = tuple(map(operator.index, prompt_ids))
    except TypeError as error:
        raise UsageError(f"the prompt must be token ids: {error}") from None
    for index, token in enumerate(prompt):
        if not 0 <= token < vocab_size:
            raise UsageError(f"prompt token {index} is {token}, outside the vocabulary of {vocab_size}")
    return prompt


def output_allowance(num_prompt: int, params: SamplingParams, *, max_model_len: int) -> int:
    """How many tokens a request may produce. Raises DoesNotFit when prompt and answer exceed the context."""
    room = max_model_len - num_prompt
    if room < 1:
        raise DoesNotFit(
            f"prompt of {num_prompt} tokens does not fit the context of {max_model_len}; "
            f"at most {max_model_len - 1} tokens would fit"
        )
    if params.max_tokens is None:
        return room
    if params.max_tokens > room:
        raise DoesNotFit(
            f"prompt of {num_prompt} tokens and max_tokens {params.max_tokens} do not fit the context of "
            f"{max_model_len}; max_tokens {room} would fit"
        )
    return params.max_tokens
