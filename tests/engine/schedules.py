"""EngineLimits, requests and steps of a scheduler that no model stands behind."""

from __future__ import annotations

from qnext.engine.policy.request import Request, SampledToken, SamplingParams
from qnext.engine.policy.scheduler import Scheduler
from qnext.engine.policy.step import EngineLimits, StepPlan, StepResult

CHUNK = 64


def limits(**changes: float | None) -> EngineLimits:
    values: dict[str, float | None] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 200,
        "block_size": 16,
        "num_blocks": 40,
        "num_slots": 4,
        "chunk_size": CHUNK,
        "max_draft_tokens": 4,
    }
    return EngineLimits(**{**values, **changes})  # type: ignore[arg-type]


def request(name: str, num_prompt: int, max_tokens: int, *, stop: int = -1, first: int = 0) -> Request:
    prompt = tuple(range(first, first + num_prompt))
    return Request(name, prompt, SamplingParams(), seed=0, max_tokens=max_tokens, stop_ids=frozenset({stop}))


def answer(plan: StepPlan, token_id: int = 7) -> StepResult:
    return StepResult({s.request_id: (SampledToken(token_id),) for s in plan.sequences if s.needs_sample})


def step(scheduler: Scheduler, token_id: int = 7) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(answer(plan, token_id))
    scheduler.check_integrity()
    return plan


def spans(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(s.request_id, s.start, s.start + len(s.token_ids), s.needs_sample) for s in plan.sequences]
