"""Distillation on answers that the student writes itself: at each of their tokens, the divergence to a teacher at hand.

Legend: T tokens, R rows with a label, D hidden, Y vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from qnext.model import CausalLM
from qnext.training.config import TrainConfig
from qnext.training.data import IGNORED, TrainBatch
from qnext.training.losses import by_chunks, wide_logits
from qnext.training.objective import Losses, LossPart, TrainStep, mtp_part, shared_terms, with_router_losses


def reverse_divergence(logits_RY: Tensor, given_RY: Tensor) -> Tensor:
    """[R] KL(student || teacher) over the whole vocabulary."""
    log_q_RY, log_p_RY = logits_RY.log_softmax(-1), given_RY.log_softmax(-1)
    return (log_q_RY.exp() * (log_q_RY - log_p_RY)).sum(-1)


@dataclass(frozen=True)
class ReverseDistillation:
    """The objective of on-policy distillation: `main` is the reverse divergence, the mean over the learnt tokens of the
    whole step. `mtp` is that of the MTP module, whose teacher is the trunk of the teacher one row later.

    The teacher reads each micro batch beside the student; the logits of both exist for some rows at a time, so no part
    of the vocabulary is left out. `num_tokens` is what both have. The gradient is that of the divergence at the tokens
    that were written, not that of having written them.
    """

    teacher: CausalLM
    num_tokens: int
    balance: float = 0.0  # coefficients
    z: float = 0.0
    mtp: float = 0.0  # 0: the MTP module does not run
    mtp_start: float = field(default=0.0, kw_only=True)
    mtp_steps: int = field(default=1, kw_only=True)
    detach_trunk: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, teacher: CausalLM, num_tokens: int, config: TrainConfig) -> ReverseDistillation:
        """With what a run sets for every objective."""
        return cls(teacher, num_tokens, **shared_terms(config))

    def __call__(self, model: CausalLM, batch: TrainBatch, step: TrainStep) -> Losses:
        given_TD, trunk = self.given(batch), model(batch.batch)
        at = torch.nonzero(batch.labels_T != IGNORED).squeeze(1)
        num_labels = max(1, sum(each.num_labels for each in step.batches))
        parts = {"main": LossPart(self.total(model, trunk.hidden_TD[at], given_TD[at]) / num_labels)}
        outputs = step.tap.take()
        more, seen = mtp_part(
            self, model, trunk, batch, step, lambda draft_TD: self._of_drafts(model, draft_TD, given_TD, batch)
        )
        parts |= more
        outputs += seen
        return with_router_losses(parts, outputs, step, balance=self.balance, z=self.z)

    def _of_drafts(self, model: CausalLM, draft_TD: Tensor, given_TD: Tensor, batch: TrainBatch) -> Tensor:
        """The sum over rows with an MTP label. The teacher's row for it is the next one."""
        at = torch.nonzero(batch.mtp_labels_T != IGNORED).squeeze(1)
        return self.total(model, draft_TD[at], given_TD[at + 1])

    @torch.no_grad()
    def given(self, batch: TrainBatch) -> Tensor:
        """[T, D of the teacher]: what its trunk makes of a batch, in its own arithmetic."""
        with torch.autocast(self.teacher.device.type, enabled=False):
            return self.teacher(batch.batch).hidden_TD

    def total(self, model: CausalLM, hidden_RD: Tensor, given_RD: Tensor) -> Tensor:
        """The sum over rows of the reverse divergence."""
        formula = partial(_divergence, teacher=self.teacher, num_tokens=self.num_tokens)
        return by_chunks(formula, model, hidden_RD, given_RD).sum()


def _divergence(model: CausalLM, hidden_RD: Tensor, given_RD: Tensor, *, teacher: CausalLM, num_tokens: int) -> Tensor:
    with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
        given_RY = wide_logits(teacher, given_RD)[:, :num_tokens]
    return reverse_divergence(wide_logits(model, hidden_RD)[:, :num_tokens], given_RY)
