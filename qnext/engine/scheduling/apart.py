"""Steps of requests that run apart, and whom a step that failed has touched. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from qnext.engine.request import Request
from qnext.engine.step import SequencePlan, StepPlan


class ApartSteps:
    """Each request that runs apart has steps of its own, all others share theirs; they take turns."""

    def __init__(self) -> None:
        self._num = 0

    def choose(self, sequences: list[SequencePlan]) -> list[SequencePlan]:
        """Those of the planned sequences that run in this step; the others are planned again in the next."""
        apart = [[sequence] for sequence in sequences if sequence.request.runs_apart]
        if not apart:
            return sequences
        others = [sequence for sequence in sequences if not sequence.request.runs_apart]
        groups = [*apart, others] if others else apart
        self._num += 1
        return groups[self._num % len(groups)]


def touched(plan: StepPlan, running: Sequence[Request]) -> list[Request]:
    """Whose caches a step that failed may have spoiled, in the order of `running`.

    Beside the step's requests these are all that were admitted and have not run: the copies of their prefixes were to
    be made with this step.
    """
    planned = {id(sequence.request) for sequence in plan.sequences}
    return [r for r in running if id(r) in planned or r.num_computed_tokens == r.num_reused_tokens]
