"""The border between policy and tensors: plans go to an executor as data, logits come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qnext.config import ModelConfig
from qnext.engine.execution.expert_load import ExpertCounter
from qnext.engine.execution.expert_reads import ExpertReads
from qnext.engine.memory import HeldBytes
from qnext.engine.policy.draft_lengths import DraftCosts
from qnext.engine.policy.request import SampledToken
from qnext.engine.policy.step import DraftPlan, StepPlan
from qnext.errors import QnextError


class PromptPart(NamedTuple):
    """What a step tells of the prompt of a request that asks for it, or why it cannot."""

    request_id: str
    tokens: Sequence[SampledToken]
    failure: QnextError | None = None


class StepOutput(NamedTuple):
    """fp32 logits [R, Y] of the sequences that need a token, a row for the last known one and one for each draft.

    They may lie in memory that the next step writes. `order` numbers the plan's sequences whose rows these are.
    """

    logits_RY: Tensor
    order: tuple[int, ...]
    prompt_tokens: Sequence[PromptPart] = ()
    was_prepared: bool = False  # whether its time is that of the next steps of this kind


class DraftOutput(NamedTuple):
    """Of a "chain" the drafted tokens of each sequence, of another pass fp32 logits [R, Y]."""

    tokens: list[list[int]]
    logits_RY: Tensor
    was_prepared: bool


class AdapterSwitch(Protocol):
    """Adapters that lie in the modules of a model. `fingerprints` by name, in the order of their numbers, from 1 on."""

    fingerprints: dict[str, str]

    def select(self, adapters_T: Tensor | None) -> None:
        """The number of the adapter of each row that the model computes next; None: the model alone."""


class Executor(Protocol):
    """Runs plans on a model and its caches: here (`LocalExecutor`), in another process, or on many ranks.

    Sampling is not its work. Logits stay on the device where they were computed, and `sampling.verify` reads them
    there, in the process of the engine, which is that of rank 0: an executor of many ranks gathers rows of logits on
    rank 0 alone. So seeds, guides and counts of tokens have one home, and other ranks learn which tokens were chosen
    from the next plan.
    """

    model_config: ModelConfig
    draft_costs: DraftCosts | None
    """What steps and passes of the MTP layer move; None where it does not draft."""
    experts: ExpertCounter | None
    """What the steps count; None where they do not."""
    adapters: Mapping[str, str]
    """The adapters that a sequence may name by their number, from 1 on: what tells each apart, by name."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run the next step. Raises what the model raises; the caches of the plan's sequences are spoiled then."""

    def draft(self, plan: DraftPlan) -> DraftOutput:
        """Run a pass of the MTP layer, between two steps."""

    def held_bytes(self) -> HeldBytes:
        """What weights, caches and the largest step take."""

    def routing_of(self, slot: int, num_tokens: int) -> NDArray[np.int64] | None:
        """See Cache.routing_of."""

    def expert_reads(self) -> ExpertReads | None:
        """What experts on disk have cost since the executor was made; None where all are in memory. Asked after every
        step, under a lock: it answers at once, with what is known on this side of the border."""

    def close(self, *plans: StepPlan) -> None:
        """Run these, which have no tokens, with as much patience as saving their prefixes takes, and let go of files
        and threads."""
