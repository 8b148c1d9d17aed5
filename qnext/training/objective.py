"""What a run learns from and what it minimises: `TrainSource`, `Objective`, and `NextToken`, the objective of texts.

A new way to train is an `Objective` and, where it reads something else than texts, a `TrainSource`. The loop calls both
and knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from qnext.model import CausalLM, RouterOutput, TrunkOutput
from qnext.training.config import TrainConfig
from qnext.training.data import TrainBatch
from qnext.training.losses import RouterTap, expert_counts, head_loss_sum, router_losses, stack_logits
from qnext.training.ranks import ALONE, TrainingRanks


class MicroBatch(Protocol):
    """What the loop needs to know of a micro batch. Its objective knows the rest."""

    @property
    def num_tokens(self) -> int:
        """The rows that the model computes."""

    def to(self: Micro, device: torch.device) -> Micro: ...


Micro = TypeVar("Micro", bound=MicroBatch)


class TrainSource(Protocol):
    """Endless micro batches in an order that is fixed from the start."""

    @property
    def epoch(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """The rows of one epoch."""

    @property
    def position(self) -> Mapping[str, Any]:
        """The place of the next micro batch, as a JSON object."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue at `position`. Raises CorruptCheckpoint where it was taken from another source."""

    def next_batch(self) -> Any: ...


class LossPart(NamedTuple):
    """One loss of a micro batch. Summed over the micro batches of a step, `value` is the loss of the step.

    Of a maximum the largest is that of the step.
    """

    value: Tensor
    weight: float = 1.0  # of the gradient; 0: only reported
    is_maximum: bool = False


@dataclass(frozen=True)
class Losses:
    """The losses of a micro batch by name. `counts_LE` are the tokens that each expert of each router got in it, and in
    those that other processes computed at the same time."""

    parts: Mapping[str, LossPart]
    counts_LE: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """What is differentiated."""
        weighted = ((part.value, part.weight) for part in self.parts.values() if part.weight)
        first, *others = (value if weight == 1.0 else weight * value for value, weight in weighted)
        for other in others:
            first = first + other
        return first

    @property
    def values(self) -> dict[str, Tensor]:
        """Scalars without a gradient, before their weights."""
        return {name: part.value.detach() for name, part in self.parts.items()}


class TrainStep(NamedTuple):
    """What a micro batch may know of its optimiser step."""

    batches: Sequence[Any]  # all micro batches of the step: losses are divided by what they hold together
    progress: float  # the part of the run that was over when the step began
    tap: RouterTap
    counts_LE: Tensor | None = None  # of the micro batches that had ended when this one began
    ranks: TrainingRanks = ALONE  # who computes other micro batches at the same time


class Objective(Protocol):
    """The losses of one micro batch. It is called in several threads at once where micro batches run side by side."""

    def __call__(self, model: CausalLM, batch: Any, step: TrainStep) -> Losses: ...


class TrainsMtp(Protocol):
    """An objective with a loss of the MTP module: see NextToken."""

    @property
    def mtp(self) -> float: ...

    @property
    def mtp_start(self) -> float: ...

    @property
    def mtp_steps(self) -> int: ...

    @property
    def detach_trunk(self) -> bool: ...


def shared_terms(config: TrainConfig) -> dict[str, Any]:
    """What a run sets for every objective that has the terms of pretraining, by the names of their fields."""
    return {
        "balance": config.balance_coefficient,
        "z": config.z_loss_coefficient,
        "mtp": config.mtp_coefficient,
        "mtp_start": config.mtp_start,
        "mtp_steps": config.mtp_steps,
        "detach_trunk": config.mtp_detach_trunk,
    }


@dataclass(frozen=True)
class NextToken:
    """The objective of pretraining and of supervised fine-tuning: `main`, and by choice `mtp`, `balance` and `z`.

    Rows whose label is IGNORED teach nothing. Each loss is the mean over the targets of the whole step, however it is
    cut into micro batches. MTP targets lie two tokens ahead, and are masked where the document ends before. With
    several MTP steps the MTP loss is their mean, and the routers' losses see only the first step.
    """

    balance: float = 0.0  # coefficients
    z: float = 0.0
    mtp: float = 0.0  # 0: the MTP module does not run
    mtp_start: float = field(default=0.0, kw_only=True)
    mtp_steps: int = field(default=1, kw_only=True)
    detach_trunk: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, config: TrainConfig) -> NextToken:
        return cls(**shared_terms(config))

    def __call__(self, model: CausalLM, batch: TrainBatch, step: TrainStep) -> Losses:
        trunk = model(batch.batch)
        num_labels = sum(each.num_labels for each in step.batches)
        parts = {"main": LossPart(head_loss_sum(model, trunk.hidden_TD, batch.labels_T) / max(1, num_labels))}
        outputs = step.tap.take()
        more, seen = mtp_part(
            self, model, trunk, batch, step, lambda draft_TD: head_loss_sum(model, draft_TD, batch.mtp_labels_T)
        )
        parts |= more
        outputs += seen
        return with_router_losses(parts, outputs, step, balance=self.balance, z=self.z)


def mtp_part(
    objective: TrainsMtp,
    model: CausalLM,
    trunk: TrunkOutput,
    rows: TrainBatch,
    step: TrainStep,
    loss_sum: Callable[[Tensor], Tensor],
) -> tuple[dict[str, LossPart], list[RouterOutput]]:
    """`mtp`, where the module is trained by now, and what the routers decided in its first draft.

    `loss_sum` makes of a draft [T, D] the sum of its losses over the rows with an MTP label.
    """
    if objective.mtp <= 0.0 or model.mtp is None or step.progress < objective.mtp_start:
        return {}, []
    if objective.detach_trunk:
        trunk = type(trunk)(*(tensor.detach() for tensor in trunk))
    outputs: list[RouterOutput] = []
    sums: list[Tensor] = []
    for draft_TD in _drafts(model, model.draft_source(trunk), rows, num_steps=objective.mtp_steps):
        seen = step.tap.take()
        outputs += [] if sums else seen
        sums.append(loss_sum(draft_TD))
    num_labels = max(1, sum(each.num_mtp_labels for each in step.batches))
    return {"mtp": LossPart(sum(sums[1:], sums[0]) / (objective.mtp_steps * num_labels), objective.mtp)}, outputs


def with_router_losses(
    parts: Mapping[str, LossPart], outputs: Sequence[RouterOutput], step: TrainStep, *, balance: float, z: float
) -> Losses:
    """The losses of an objective and, where routers decided in the micro batch, `balance` and `z` with these
    coefficients: the mean over the micro batches of the step."""
    if not outputs:
        return Losses(parts)
    own_LE = expert_counts(outputs, num_experts=outputs[0].logits_TE.shape[-1])
    all_RLE = step.ranks.gather(own_LE.flatten()).view(-1, *own_LE.shape)
    # What one process would have counted by now: the micro batches before this one, and this one.
    seen_LE = all_RLE[: step.ranks.share + 1].sum(0)
    if step.counts_LE is not None:
        seen_LE = step.counts_LE + seen_LE
    balance_loss, z_loss = (loss / len(step.batches) for loss in router_losses(stack_logits(outputs), seen_LE))
    if step.ranks.num_cuts > 1:  # each is the mean over the rows of this process
        share = own_LE.sum().to(balance_loss) / all_RLE[step.ranks.share].sum()
        balance_loss, z_loss = share * balance_loss, share * z_loss
    return Losses({**parts, "balance": LossPart(balance_loss, balance), "z": LossPart(z_loss, z)}, all_RLE.sum(0))


def _drafts(model: CausalLM, source_TD: Tensor, batch: TrainBatch, *, num_steps: int) -> Iterator[Tensor]:
    """[T, D] of each step: the MTP module's result for every row.

    From the second step on a row reads, for the trunk's row, what the module made one place before, as it will when it
    drafts one token after another; the first row of a document has none before it and reads the trunk's again.
    """
    is_first_T1 = (batch.batch.positions_T == 0)[:, None]
    rows_TD = source_TD
    for _ in range(num_steps):
        draft_TD = model.draft_step(batch.next_ids_T, rows_TD, batch.batch)
        yield draft_TD
        rows_TD = torch.where(is_first_T1, source_TD, draft_TD.roll(1, dims=0))
