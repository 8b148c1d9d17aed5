"""What is asked of the engine, checked, and how far it has come. No torch."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qnext.engine.policy.params import SamplingParams
from qnext.engine.policy.watermark_key import MarkedPlaces
from qnext.errors import CorruptCheckpoint, DoesNotFit, QnextError, RequestBroke, UsageError

# "error": nothing may be chosen, see `failure`; "deadline": out of time
FinishReason = Literal["stop", "length", "abort", "error", "deadline"]


class SampledToken(NamedTuple):
    """One token of an answer or a prompt.

    Log-probabilities are those of the raw logits, in nats, before penalties and temperature.
    """

    token_id: int
    logprob: float | None = None  # None unless asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    rank: int | None = None  # among all tokens, the likeliest is 1; of tokens of a prompt alone


class Guide(Protocol):
    """What a request may say next. It is asked once for each token and told of each token that is chosen.

    Either may raise a QnextError, which ends this request only.
    """

    def allowed(self) -> NDArray[np.int32] | None:
        """Bit t % 32 of word t // 32 is set when token t may be chosen; None when all may."""

    def accept(self, token_id: int) -> None:
        """The token was chosen; also called with one that ends the request."""

    def copy(self) -> Guide:
        """One for another answer, from where this one is."""


@dataclass
class RequestTimes:
    """Seconds on the engine's clock; None for what has not happened."""

    arrived: float = 0.0
    scheduled: float | None = None  # its first step began
    first_token: float | None = None
    last_token: float | None = None  # of those so far; tokens of one step share their time
    finished: float | None = None


@dataclass(eq=False)
class Request:
    """What was asked, and what came out so far. How far its computation has come is its Sequence's.

    The scheduler appends tokens and says why the request ended, the engine why it failed, the metrics when. A stop
    token is the last of `output_ids` when `finish_reason` is "stop".
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]
    salt: str = ""  # only requests of one salt share cached prefixes
    owner: str = ""  # for whose share of everything it counts; a salt belongs to one owner
    adapter: int = 0  # the number of the adapter that answers; 0: none. Its salt keeps its prefixes apart
    guide: Guide | None = None  # says which tokens may be chosen
    marks: MarkedPlaces | None = None  # which places of the answer a watermark marks
    deadline: float | None = None  # on the engine's clock
    output_ids: list[int] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    sampled: list[SampledToken] = field(default_factory=list)  # only when logprobs are asked for
    prompt_sampled: list[SampledToken] = field(default_factory=list)  # only when prompt_logprobs are asked for
    routing: NDArray[np.int64] | None = None  # of one that has ended, where the engine keeps it: see Completion
    finish_reason: FinishReason | None = None
    failure: QnextError | None = None
    times: RequestTimes = field(default_factory=RequestTimes)
    num_cached_tokens: int | None = None  # of the prompt, found in the cache on admission
    num_drafted: int = 0  # tokens that were verified, and how many of them became the answer's
    num_accepted: int = 0

    @property
    def fault(self) -> BaseException | None:
        """What the model or the program did wrong, where that ended the request; not what the request asked for."""
        if isinstance(self.failure, RequestBroke):
            return self.failure.__cause__ or self.failure
        return self.failure if isinstance(self.failure, CorruptCheckpoint) else None

    def raise_failure(self) -> None:
        """Raises what ended this request, if something did: its `fault`, or its `failure`. To be asked by whoever waits
        for its tokens."""
        if self.failure is not None:
            raise self.fault or self.failure

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens that can ever lie in the cache: the last one chosen is never read back."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @cached_property
    def prompt_tokens(self) -> NDArray[np.intp]:
        """The prompt's tokens, each once."""
        return np.unique(np.array(self.prompt_ids, dtype=np.intp))

    def token_range(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens `start` to `end` of prompt and output together."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return tuple(self.output_ids[start - num_prompt : end - num_prompt])
        return self.prompt_ids[start:end] + tuple(self.output_ids[: max(0, end - num_prompt)])

    def append(self, token: SampledToken) -> FinishReason | None:
        """Add a chosen token; returns why the request ends with it, if it does."""
        self.output_ids.append(token.token_id)
        self.output_counts[token.token_id] += 1
        if self.params.logprobs is not None:
            self.sampled.append(token)
        return self.end_reason(token.token_id, len(self.output_ids))

    def end_reason(self, token_id: int, num_output: int) -> FinishReason | None:
        """Why the request ends, if it does, with this token as the last of `num_output`."""
        if token_id in self.stop_ids:
            return "stop"
        return "length" if num_output >= self.max_tokens else None


def checked_prompt(prompt_ids: Sequence[int], *, vocab_size: int) -> tuple[int, ...]:
    """The prompt as a tuple. Raises UsageError when it is empty or holds what is no id of the vocabulary."""
    if not len(prompt_ids):
        raise UsageError("the prompt is empty")
    try:
        prompt = tuple(map(operator.index, prompt_ids))
    except TypeError as error:
        raise UsageError(f"the prompt must be token ids: {error}") from None
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        index, token = next((i, t) for i, t in enumerate(prompt) if not 0 <= t < vocab_size)
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
    if params.min_tokens > room:
        raise DoesNotFit(
            f"prompt of {num_prompt} tokens and min_tokens {params.min_tokens} do not fit the context of "
            f"{max_model_len}; min_tokens {room} would fit"
        )
    if params.max_tokens is None:
        return room
    if params.max_tokens > room:
        raise DoesNotFit(
            f"prompt of {num_prompt} tokens and max_tokens {params.max_tokens} do not fit the context of "
            f"{max_model_len}; max_tokens {room} would fit"
        )
    return params.max_tokens
