"""One request that breaks, wherever it breaks, ends alone: the others get what they would have got without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from qnext.engine import EndEvent, Engine, Request, SamplingParams
from qnext.engine.drafter import Drafter
from qnext.engine.execution.executor import StepOutput
from qnext.engine.policy import sequence as planned
from qnext.engine.policy.step import SequencePlan, StepPlan
from qnext.errors import NotFinite, RequestBroke
from qnext.model import CausalLM
from tests.engine.drafting import draft_always, make_engine
from tests.engine.executors import Wrapped, sampled
from tests.engine.models import NATIVE, needs_native
from tests.model.models import make_in_form

CULPRIT = "culprit"
SHARED = list(range(20, 90))  # of all prompts, so that what is cached of one is read by others
POISON = 11  # a token that no victim reads or chooses


class Panic(BaseException):
    """What a library's panic is to Python."""


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)


def victims(engine: Engine) -> list[Request]:
    base = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2, banned_token_ids=(POISON,))
    chosen = [
        base,
        replace(base, temperature=1.0, seed=5, top_k=20),
        replace(base, temperature=0.7, seed=6, repetition_penalty=1.3, prompt_logprobs=1),
    ]
    return [
        engine.add_request([*SHARED[: 30 + 20 * n], 3 * n, 3 * n + 1], params, request_id=f"victim-{n}")
        for n, params in enumerate(chosen)
    ]


def add_culprit(engine: Engine, **more: Any) -> Request:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=8)
    return engine.add_request([*SHARED[:50], 2], replace(params, **more), request_id=CULPRIT)


def run(engine: Engine) -> list[EndEvent]:
    ended = []
    for _ in range(400):
        if not engine.has_unfinished:
            break
        ended += [event for event in engine.step() if isinstance(event, EndEvent)]
        engine.check_integrity()
    assert not engine.has_unfinished
    return ended


def engine_of(model: CausalLM, *, drafts: bool) -> Engine:
    engine = make_engine(model, max_num_seqs=5, max_model_len=256, speculation=drafts, checkpoint_interval=32)
    if drafts:
        draft_always(engine)
    return engine


def answers(requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    return [(tuple(r.output_ids), tuple(r.sampled), tuple(r.prompt_sampled), r.finish_reason) for r in requests]


@lru_cache(maxsize=4)
def answers_without_a_culprit(model: CausalLM, drafts: bool) -> list[list[tuple[Any, ...]]]:
    """Of the victims: once from the beginning and once where all prefixes are cached."""
    engine = engine_of(model, drafts=drafts)
    wanted = []
    for _ in range(2):
        requests = victims(engine)
        run(engine)
        wanted.append(answers(requests))
    return wanted


def check(
    model: CausalLM, spoil: Callable[[Engine], Request], *, drafts: bool, is_exact: bool = True
) -> tuple[Engine, Request]:
    """`spoil` adds the culprit to an engine, once alone and once where all prefixes are cached."""
    engine = engine_of(model, drafts=drafts)
    for expected in answers_without_a_culprit(model, drafts):
        requests = victims(engine)
        culprit = spoil(engine)
        ended = run(engine)
        assert ended == [EndEvent(CULPRIT, "error")] and culprit.failure is not None
        found = answers(requests)
        if is_exact:
            assert found == expected
        for one, other in zip(found, expected, strict=True):
            assert (one[0], one[3]) == (other[0], other[3])
            for token, same in zip([*one[1], *one[2]], [*other[1], *other[2]], strict=True):
                assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
    return engine, culprit


class Spoiled(Wrapped):
    """Calls `spoil` with the plan and the result of each step that the culprit is in."""

    def __init__(self, engine: Engine, spoil: Callable[[StepPlan, StepOutput], StepOutput]) -> None:
        super().__init__(engine)
        self.spoil = spoil
        self.num_spoiled = 0

    def execute(self, plan: StepPlan) -> StepOutput:
        output = super().execute(plan)
        if all(sequence.request_id != CULPRIT for sequence in plan.sequences):
            return output
        self.num_spoiled += 1
        return self.spoil(plan, output)


class Breaking:
    """A guide that allows everything, and breaks when it is told of its fifth token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.num_told = error, 0

    def allowed(self) -> np.ndarray | None:
        return None

    def accept(self, token_id: int) -> None:
        self.num_told += 1
        if self.num_told == 5:
            raise self.error

    def copy(self) -> Breaking:
        return self


@needs_native
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("error", [RuntimeError("x"), Panic("x")], ids=["error", "panic"])
def test_a_guide_that_breaks(model: CausalLM, drafts: bool, error: BaseException) -> None:
    def spoil(engine: Engine) -> Request:
        request = add_culprit(engine)
        request.guide = Breaking(error)
        return request

    _, culprit = check(model, spoil, drafts=drafts)
    assert isinstance(culprit.failure, RequestBroke) and culprit.fault is error
    assert len(culprit.output_ids) <= 4


def num_chosen(sequence: SequencePlan) -> int:
    """Tokens of the answer before the step; only once the prompt is read."""
    return sequence.start + len(sequence.token_ids) - sequence.num_drafts - sequence.num_prompt


def nan_rows(plan: StepPlan, output: StepOutput) -> StepOutput:
    """The culprit's logits, once it has three tokens."""
    logits_RY = output.logits_RY.clone()
    first = 0
    for sequence in sampled(plan, output):
        end = first + 1 + sequence.num_drafts
        if sequence.request_id == CULPRIT and num_chosen(sequence) >= 3:
            logits_RY[first:end, 7] = torch.nan
        first = end
    return output._replace(logits_RY=logits_RY)


@needs_native
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
def test_logits_that_are_not_finite(model: CausalLM, drafts: bool) -> None:
    def spoil(engine: Engine) -> Request:
        Spoiled(engine, nan_rows)
        return add_culprit(engine)

    _, culprit = check(model, spoil, drafts=drafts)
    assert isinstance(culprit.failure, NotFinite) and culprit.fault is culprit.failure


@needs_native
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("asks", [{}, {"prompt_logprobs": 1}], ids=["answer", "prompt"])
def test_weights_that_overflow_for_one_prompt(model: CausalLM, drafts: bool, asks: dict[str, int]) -> None:
    """The embedding of one token is NaN, and with it all that is computed of a prompt that holds it."""
    poisoned = copy.deepcopy(model)
    with torch.no_grad():
        poisoned.model.embed_tokens.weight[POISON] = torch.nan

    def spoil(engine: Engine) -> Request:
        params = SamplingParams(max_tokens=40, **asks)
        return engine.add_request([*SHARED[:64], POISON, 5, 6], params, request_id=CULPRIT)

    _, culprit = check(poisoned, spoil, drafts=drafts)
    assert isinstance(culprit.failure, NotFinite) and not culprit.output_ids


@needs_native
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("num_tokens", [0, 6], ids=["prompt", "answer"])
def test_a_model_that_raises_at_one_request(model: CausalLM, drafts: bool, num_tokens: int) -> None:
    def fail(plan: StepPlan, output: StepOutput) -> StepOutput:
        (culprit,) = (s for s in plan.sequences if s.request_id == CULPRIT)
        if num_tokens == 0 or num_chosen(culprit) >= num_tokens:
            raise RuntimeError("the caches are written, and nobody knows what of them")
        return output

    def spoil(engine: Engine) -> Request:
        Spoiled(engine, fail)
        return add_culprit(engine)

    engine, culprit = check(model, spoil, drafts=drafts, is_exact=False)
    assert isinstance(culprit.fault, RuntimeError)
    assert not engine.scheduler.recovery._num_suspected


@needs_native
def test_steps_that_fail_for_their_company_end_nobody(model: CausalLM) -> None:
    """As where memory is short: the same requests are answered apart."""
    reference = engine_of(model, drafts=False)
    wanted = victims(reference)
    run(reference)

    def run_step(plan: StepPlan) -> StepOutput:
        output = usual(plan)
        if len(plan.sequences) > 1:
            raise MemoryError
        return output

    engine = engine_of(model, drafts=False)
    usual, engine.executor.execute = engine.executor.execute, run_step  # type: ignore[method-assign]
    requests = victims(engine)
    assert run(engine) == []
    assert [r.output_ids for r in requests] == [r.output_ids for r in wanted]


@needs_native
def test_a_drafter_that_raises_ends_nobody(model: CausalLM) -> None:
    reference = engine_of(model, drafts=True)
    wanted = victims(reference)
    run(reference)
    engine = engine_of(model, drafts=True)
    assert isinstance(engine.drafter, Drafter)
    usual = engine.drafter.propose

    def propose(sequences: list[planned.Sequence]) -> dict[str, tuple[int, ...]]:
        drafts = usual(sequences)
        if any(each.id == CULPRIT and len(each.request.output_ids) > 4 for each in sequences):
            raise RuntimeError("no drafts")
        return drafts

    engine.drafter.propose = propose  # type: ignore[method-assign]
    requests = victims(engine)
    culprit = add_culprit(engine)
    assert run(engine) == []
    assert answers(requests) == answers(wanted)
    assert culprit.finish_reason == "length"
    assert set(engine.drafter._barred) == {culprit}
    assert all(request.num_drafted for request in requests)


@needs_native
def test_a_step_of_nobody_that_fails_is_the_callers(model: CausalLM) -> None:
    engine = engine_of(model, drafts=False)
    victims(engine)
    engine.step()

    def interrupt(plan: StepPlan) -> StepOutput:
        raise KeyboardInterrupt

    engine.executor.execute = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine.has_unfinished
    engine.check_integrity()


@needs_native
def test_what_generates_for_a_library_raises_the_fault_itself(model: CausalLM) -> None:
    engine = engine_of(model, drafts=False)

    def fail(plan: StepPlan) -> StepOutput:
        raise RuntimeError("no memory")

    engine.executor.execute = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no memory"):
        engine.generate([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="no memory"):
        list(engine.stream([1, 2, 3]))
    engine.check_integrity()
