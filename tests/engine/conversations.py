"""Random conversations with an engine, and what each request would have got alone."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, EngineConfig, Request, SamplingParams
from qnext.model import CausalLM
from tests.engine.drafts import GivenDrafts
from tests.engine.executors import KeepingExecutor, local

MAX_LEN = 256
# Each form once and each schedule at least once, and the rest.
SCHEDULES = [("float32", 0), ("bfloat16", 1), ("int4-g32", 0)]
OTHER_SCHEDULES = [("float32", 1), ("bfloat16", 0), ("int4-g32", 1)]
SOME_SCHEDULES = [*SCHEDULES, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHER_SCHEDULES)]


class Conversations:
    """Random prompts that share beginnings: system prompts, turns of one conversation, the same prompt again."""

    def __init__(self, rng: random.Random, vocab_size: int) -> None:
        self.rng, self.vocab_size = rng, vocab_size
        self.systems = [self.tokens(length) for length in (70, 33, 96)]
        self.history: list[list[int]] = []

    def tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(length)]

    def prompt(self) -> list[int]:
        kind = self.rng.random()
        if self.history and kind < 0.4:
            base = self.rng.choice(self.history)
            base = base[: self.rng.randint(1, len(base))] if self.rng.random() < 0.3 else base
            prompt = base + self.tokens(self.rng.randint(1, 25))
        elif kind < 0.8:
            prompt = self.rng.choice(self.systems) + self.tokens(self.rng.randint(1, 40))
        else:
            prompt = self.tokens(self.rng.randint(1, 120))
        return prompt[: MAX_LEN - 30]

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.rng.randint(1, 25),
            ignore_eos=True,
            seed=self.rng.randrange(1000),
            temperature=self.rng.choice((0.0, 0.0, 1.0)),
        )


class Answer(NamedTuple):
    request: Request
    wanted: list[int]  # what it gets alone
    wanted_rows: Tensor
    rows: list[Tensor]


def run_traffic(
    model: CausalLM,
    *,
    seed: int,
    num_requests: int,
    max_draft_tokens: int = 0,
    state_dtype: torch.dtype = torch.float32,
    has_turns: bool = True,
    failure_rate: float = 0.0,
) -> tuple[list[Answer], Engine]:
    """Requests that come, go and are aborted at random on an engine that is far too small for them.

    Drafts are what the request would get alone, now and then spoiled. So many of the steps fail.
    """
    rng = random.Random(seed)
    engine = Engine.of(
        model,
        EngineConfig(
            max_num_seqs=rng.randint(2, 5),
            max_model_len=MAX_LEN,
            num_blocks=rng.randint(17, 40),
            num_checkpoints=rng.randint(1, 8),
            max_num_batched_tokens=rng.choice((70, 100, 300)),
            checkpoint_interval=rng.choice((0, 50)),
            max_draft_tokens=max_draft_tokens,
            state_dtype=state_dtype,
            poison=True,
        ),
    )
    if engine.scheduler.prefixes is not None:
        engine.scheduler.prefixes.min_tokens = 4
    engine.drafter = given = GivenDrafts()
    executor = KeepingExecutor(engine)
    conversations = Conversations(rng, model.config.vocab_size)
    answers: list[Answer] = []
    while len(answers) < num_requests or engine.has_unfinished:
        for _ in range(rng.randint(0, 3) if len(answers) < num_requests else 0):
            prompt, params = conversations.prompt(), conversations.params()
            assert params.max_tokens is not None
            wanted, wanted_rows = alone(model, prompt, params, params.max_tokens, state_dtype)
            request = engine.add_request(prompt, params, salt=rng.choice(("", "", "b")))
            answers.append(Answer(request, wanted, wanted_rows, executor.rows.setdefault(request.id, [])))
            if has_turns:
                conversations.history.append(prompt + wanted)
        if rng.random() < 0.05 and engine.has_unfinished:
            engine.abort(rng.choice([a.request.id for a in answers[-8:]]))
        for request, wanted, _, _ in answers[-20:]:
            if max_draft_tokens and request.output_ids:
                next_ids = wanted[len(request.output_ids) :][: rng.randint(0, max_draft_tokens)]
                spoiled = rng.randrange(2 * max_draft_tokens)
                given[request.id] = tuple(3 if i == spoiled else t for i, t in enumerate(next_ids))
        if rng.random() < failure_rate:
            step_that_fails(engine, in_forward=rng.random() < 0.7)
        else:
            engine.step()
        engine.check_integrity()
    return answers, engine


class Broken(Exception):
    pass


def step_that_fails(engine: Engine, *, in_forward: bool) -> None:
    """In the last layer of the model, or before anything is copied; a step without tokens does not fail."""

    def fail(*_: object) -> None:
        raise Broken

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Broken):
        if not in_forward:
            patch.setattr(local(engine).cache, "prepare", fail)
        hook = local(engine).model.model.layers[-1].register_forward_pre_hook(fail)
        try:
            engine.step()
        finally:
            hook.remove()


def alone(
    model: CausalLM,
    prompt: list[int],
    params: SamplingParams,
    num_tokens: int,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[list[int], Tensor]:
    engine, executor = lonely_engine(model, state_dtype)
    completion = engine.generate([prompt], replace(params, max_tokens=num_tokens))[0]
    return list(completion.output_ids), torch.stack(executor.rows.pop(completion.request_id))


@lru_cache(maxsize=1)
def lonely_engine(model: CausalLM, state_dtype: torch.dtype) -> tuple[Engine, KeepingExecutor]:
    """One request at a time, of which nothing is left to the next one: to make an engine anew for each takes longer."""
    engine = Engine.of(
        model,
        EngineConfig(max_num_seqs=1, max_model_len=MAX_LEN, prefix_cache=False, poison=True, state_dtype=state_dtype),
    )
    return engine, KeepingExecutor(engine)


def check(answers: list[Answer], *, min_complete: float = 0.5) -> None:
    assert sum(answer.request.finish_reason == "length" for answer in answers) > min_complete * len(answers)
    for request, wanted, _, _ in answers:
        assert request.output_ids == (
            wanted if request.finish_reason == "length" else wanted[: len(request.output_ids)]
        )
