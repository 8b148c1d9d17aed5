"""Requests on an engine, timed: the phase in which all of them write, and what the scheduler takes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from qnext.engine import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from qnext.engine.policy.step import StepPlan, StepResult
from qnext.errors import UsageError
from qnext.model import CausalLM


def make_engine(model: CausalLM, *, speculate: bool, max_num_seqs: int, max_model_len: int) -> Engine:
    """The only place here that says how drafting is switched on and off."""
    return Engine.of(model, EngineConfig(max_num_seqs=max_num_seqs, max_model_len=max_model_len, speculation=speculate))


class RandomTokens:
    """Prompts that nobody has seen before; the same ones in every run."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def take(self, num_tokens: int) -> list[int]:
        return torch.randint(0, self._vocab_size, (num_tokens,), generator=self._generator).tolist()


@dataclass
class Phase:
    """What happened while all streams wrote: from the last one's first token to the first one's last."""

    num_streams: int
    seconds: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    scheduler_seconds: float = 0.0
    answers: list[list[int]] = field(default_factory=list)  # all tokens of each stream, until then

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def scheduler_share(self) -> float:
        return self.scheduler_seconds / self.seconds


def write_together(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Phase:
    """All prompts at once, each with its own parameters; what is left at the end of the phase is aborted."""
    requests = [engine.add_request(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    while any(not request.output_ids for request in requests):
        engine.step()
        for request in requests:
            request.raise_failure()
    _require_unfinished(requests)
    phase = Phase(len(requests))
    scheduler = engine.scheduler
    with (
        patch.object(scheduler, "plan", _watched(scheduler.plan, phase)),
        patch.object(scheduler, "commit", _watched(scheduler.commit, phase)),
    ):
        start = time.perf_counter()
        while all(request.finish_reason is None for request in requests):
            phase.num_tokens += sum(isinstance(event, TokenEvent) for event in engine.step())
            phase.num_steps += 1
        phase.seconds = time.perf_counter() - start
    phase.answers = [list(request.output_ids) for request in requests]
    for request in requests:
        engine.abort(request.id)
    return phase


def _watched(function: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
    """Adds the time of a call to the phase, and what it says of drafts."""

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        value = function(*arguments)
        phase.scheduler_seconds += time.perf_counter() - start
        if isinstance(value, StepPlan):
            phase.num_drafts += sum(sequence.num_drafts for sequence in value.sequences)
        for result in arguments:
            if isinstance(result, StepResult):
                phase.num_accepted += sum(len(tokens) - 1 for tokens in result.tokens.values())
        return value

    return call


def _require_unfinished(requests: Sequence[Request]) -> None:
    if any(request.finish_reason is not None for request in requests):
        raise UsageError("a stream ended before the last one had begun: ask for more tokens")


def rate_of(arrivals: Sequence[Sequence[float]], num_tokens: int) -> float:
    """Tokens a second in the same phase, from the times at which the tokens of each stream came.

    Text that is no whole character is sent with the next token, so an answer of `num_tokens` has fewer arrivals;
    those count for more.

    >>> rate_of([[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]], 4)
    2.0
    """
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    if end <= start:
        raise UsageError("a stream ended before the last one had begun: ask for more tokens")
    return sum(sum(start < t <= end for t in times) * num_tokens / len(times) for times in arrivals) / (end - start)


def first_token_seconds(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
    """(time to the first token, greedy answer)."""
    start = time.perf_counter()
    events = engine.stream(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    answer = [next(events).token.token_id]
    seconds = time.perf_counter() - start
    return seconds, answer + [event.token.token_id for event in events]
