"""Executors of tests: what runs an engine's plans, looked at or disturbed."""

from __future__ import annotations

from torch import Tensor

from qnext.engine import Engine
from qnext.engine.execution.executor import StepOutput
from qnext.engine.execution.local import LocalExecutor
from qnext.engine.policy.step import SequencePlan, StepPlan
from qnext.engine.storage.tiers import Tiers


def local(engine: Engine) -> LocalExecutor:
    assert isinstance(engine.executor, LocalExecutor)
    return engine.executor


def tiers_of(engine: Engine) -> Tiers:
    store = local(engine).store
    assert isinstance(store, Tiers)
    return store


def sampled(plan: StepPlan, output: StepOutput) -> list[SequencePlan]:
    """The sequences that the rows of logits belong to."""
    return [plan.sequences[number] for number in output.order]


class Wrapped(LocalExecutor):
    """The same executor, in its place at an engine: for tests that change what it does."""

    def __init__(self, engine: Engine) -> None:
        vars(self).update(vars(local(engine)))
        engine.executor = self


class KeepingExecutor(Wrapped):
    """Keeps the logits of every chosen token of steps without drafts."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.rows: dict[str, list[Tensor]] = {}

    def execute(self, plan: StepPlan) -> StepOutput:
        output = super().execute(plan)
        if not any(sequence.num_drafts for sequence in plan.sequences):
            for row, sequence in zip(output.logits_RY, sampled(plan, output), strict=True):
                self.rows.setdefault(sequence.request_id, []).append(row.clone())
        return output
