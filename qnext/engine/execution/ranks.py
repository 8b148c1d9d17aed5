"""Plans on several ranks, each of which has a part of the model and of its caches.

The engine lives in the first rank. Every rank runs every plan; what they tell each other meanwhile is the affair of the
modules of their models. Logits come together in all ranks, and the engine samples from those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qnext.config import ModelConfig
from qnext.engine.execution.executor import DraftOutput, Executor, StepOutput
from qnext.engine.execution.expert_load import ExpertCounter
from qnext.engine.execution.expert_reads import ExpertReads
from qnext.engine.execution.orders import from_bytes, to_bytes
from qnext.engine.memory import HeldBytes
from qnext.engine.policy.draft_lengths import DraftCosts
from qnext.engine.policy.step import DraftPlan, StepPlan
from qnext.errors import LostRank, QnextError, ends_engine

_Output = TypeVar("_Output")


class Ranks(Protocol):
    """How orders come from the first rank to the others. Raises LostRank where one is gone. `num_local` ranks share the
    memory of this machine."""

    num_local: int

    def tell(self, order: bytes) -> None: ...

    def hear(self) -> bytes: ...

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of each over all ranks, which all ask."""

    def all_broke(self) -> bool:
        """Whether the last order broke off on all ranks, as it did on this one. Waits a moment for the others."""

    def fault(self) -> QnextError | None:
        """What a rank could not read for the last order, which all have carried out to its end nevertheless."""


class RanksExecutor:
    """The executor of the first rank: what `own` does, all others do as well.

    A plan that breaks off on every rank raises the error of the first: all have dropped it, and the next one can run.
    Where it breaks off on some, or a rank is lost, the ranks stand at different places of a step, so that this executor
    raises LostRank from then on. `may_fault`: some rank may go on without its part (`Ranks.fault`), which drops the
    plan as well. `at_end` is told whether the others have heard that there is no more.
    """

    def __init__(self, own: Executor, ranks: Ranks, at_end: Callable[[bool], None], *, may_fault: bool = False) -> None:
        self._own, self._ranks, self._at_end, self._may_fault = own, ranks, at_end, may_fault
        self._lost: LostRank | None = None
        self.model_config: ModelConfig = own.model_config
        self.draft_costs: DraftCosts | None = own.draft_costs  # of one rank
        self.experts: ExpertCounter | None = own.experts  # of all: each router sees every token
        self.adapters: Mapping[str, str] = own.adapters

    def execute(self, plan: StepPlan) -> StepOutput:
        return self._with_all(plan, lambda: self._own.execute(plan))

    def draft(self, plan: DraftPlan) -> DraftOutput:
        return self._with_all(plan, lambda: self._own.draft(plan))

    def _with_all(self, plan: StepPlan | DraftPlan, run: Callable[[], _Output]) -> _Output:
        if self._lost is not None:
            raise self._lost
        try:
            self._ranks.tell(to_bytes(plan))
            output, failure = _together(self._ranks, run, may_fault=self._may_fault)
        except BaseException as error:
            self._lost = _lost_by(error)
            if isinstance(error, Exception):
                raise self._lost from error
            raise
        if failure is not None:
            raise failure
        assert output is not None
        return output

    def held_bytes(self) -> HeldBytes:
        """Of one rank."""
        return self._own.held_bytes()

    def routing_of(self, slot: int, num_tokens: int) -> NDArray[np.int64] | None:
        return self._own.routing_of(slot, num_tokens)

    def expert_reads(self) -> ExpertReads | None:
        """Of this rank."""
        return self._own.expert_reads()

    def close(self, *plans: StepPlan) -> None:
        try:
            if self._lost is None:
                self._ranks.tell(to_bytes(None))
        except LostRank as lost:  # there is nothing left that could be wrong
            self._lost = lost
        finally:
            self._own.close()
            self._at_end(self._lost is None)


def _together(ranks: Ranks, run: Callable[[], _Output], *, may_fault: bool) -> tuple[_Output | None, Exception | None]:
    """What this rank makes of a plan, and why all ranks drop it. Raises what has broken it off here and not on all."""
    try:
        output = run()
    except Exception as error:
        if ends_engine(error) or not ranks.all_broke():
            raise
        return None, error
    return output, ranks.fault() if may_fault else None


def _lost_by(error: BaseException) -> LostRank:
    if isinstance(error, LostRank):
        return error
    if isinstance(error, QnextError):
        return LostRank.because(f"rank 0: {error}", error.exit_code)
    return LostRank(f"rank 0 could not run a step: {type(error).__name__}")


def follow(own: Executor, ranks: Ranks, *, may_fault: bool = False) -> None:
    """What all ranks but the first do, until the engine is closed. Raises what the model raises at a plan that other
    ranks could run: this one is of no use to them."""
    while (order := from_bytes(ranks.hear())) is not None:
        run = partial(own.execute, order) if isinstance(order, StepPlan) else partial(own.draft, order)
        _together(ranks, run, may_fault=may_fault)
    own.close()
