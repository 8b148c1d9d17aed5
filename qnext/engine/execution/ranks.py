"""Plans on several ranks, each of which has a part of the model and of its caches.

The engine lives in the first rank. Every rank runs every plan; what they tell each other meanwhile is the affair of the
modules of their models. Logits come together in all ranks, and the engine samples from those of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

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


class Ranks(Protocol):
    """How orders come from the first rank to the others. Raises LostRank where one is gone."""

    def tell(self, order: bytes) -> None: ...

    def hear(self) -> bytes: ...

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of each over all ranks, which all ask."""


class RanksExecutor:
    """The executor of the first rank: what `own` does, all others do as well."""

    def __init__(self, own: Executor, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks
        self.model_config: ModelConfig = own.model_config
        self.draft_costs: DraftCosts | None = own.draft_costs  # of one rank
        self.experts: ExpertCounter | None = own.experts  # of all: each router sees every token
        self.adapters: Mapping[str, str] = own.adapters

    def execute(self, plan: StepPlan) -> StepOutput:
        self._ranks.tell(to_bytes(plan))
        return self._own.execute(plan)

    def draft(self, plan: DraftPlan) -> DraftOutput:
        self._ranks.tell(to_bytes(plan))
        return self._own.draft(plan)

    def held_bytes(self) -> HeldBytes:
        """Of one rank."""
        return self._own.held_bytes()

    def routing_of(self, slot: int, num_tokens: int) -> NDArray[np.int64] | None:
        return self._own.routing_of(slot, num_tokens)

    def expert_reads(self) -> ExpertReads | None:
        """Of this rank."""
        return self._own.expert_reads()

    def close(self, *plans: StepPlan) -> None:
        self._ranks.tell(to_bytes(None))
        self._own.close()


def follow(own: Executor, ranks: Ranks) -> None:
    """What all ranks but the first do, until the engine is closed. Raises what the model raises: a rank that could not
    run a plan is of no use to the others."""
    while (order := from_bytes(ranks.hear())) is not None:
        if isinstance(order, StepPlan):
            own.execute(order)
        else:
            own.draft(order)
    own.close()
