"""Distillation from what a teacher said of the data beforehand: the largest of its probabilities, or samples of them.

The k largest probabilities and the mass of all others make a distribution whose divergence is a lower bound, biased
against rare tokens. Tokens drawn from the teacher's distribution give the gradient of the full divergence on average
(arXiv 2503.16870).

Legend: R rows with a label, K entries of a row, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM
from qnext.training.data import IGNORED, Document, DocumentRows, TrainBatch, pack
from qnext.training.losses import by_chunks, wide_logits
from qnext.training.objective import Losses, LossPart, TrainStep, with_router_losses

KeptTokens = Literal["top", "sampled"]


class TeacherAnswers(NamedTuple):
    """What is kept of a teacher's distribution at each of R rows.

    Of "top": the tokens of the K largest probabilities and these as logarithms, and that of the mass of all others
    (-inf for none). Of "sampled": K drawn tokens, which may be equal, each with the logarithm of 1/K, and -inf.
    """

    ids_RK: Tensor
    log_probs_RK: Tensor
    log_tail_R: Tensor


@torch.no_grad()
def answers_of(
    logits_RY: Tensor,
    *,
    kept: KeptTokens,
    count: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> TeacherAnswers:
    """What is kept of softmax(logits / temperature), in the type of the logits."""
    log_probs_RY = (logits_RY / temperature).log_softmax(-1)
    num_rows, num_tokens = logits_RY.shape
    if kept == "sampled":
        ids_RK = torch.multinomial(log_probs_RY.exp(), count, replacement=True, generator=generator)
        even = log_probs_RY.new_full((num_rows, count), 1.0 / count).log()
        return TeacherAnswers(ids_RK, even, log_probs_RY.new_full((num_rows,), -torch.inf))
    log_probs_RK, ids_RK = log_probs_RY.topk(count, dim=-1)
    if count == num_tokens:
        return TeacherAnswers(ids_RK, log_probs_RK, log_probs_RY.new_full((num_rows,), -torch.inf))
    others_RY = log_probs_RY.scatter(1, ids_RK, -torch.inf)
    return TeacherAnswers(ids_RK, log_probs_RK, others_RY.logsumexp(-1))


def divergence(logits_RY: Tensor, answers: TeacherAnswers, *, temperature: float = 1.0) -> Tensor:
    """[R] KL(teacher || student) of what is kept, all other tokens as one.

    Drawn tokens have no mass beside them: of them it is the cross entropy of the draws less ln K, whose gradient is, on
    average, that of the full divergence.
    """
    log_q_RY = (logits_RY / temperature).log_softmax(-1)
    log_p_RK = answers.log_probs_RK.to(log_q_RY.dtype)
    kept_R = (log_p_RK.exp() * (log_p_RK - log_q_RY.gather(1, answers.ids_RK))).sum(-1)
    has_tail_R = answers.log_tail_R > -torch.inf
    if not has_tail_R.any():
        return kept_R
    others_RY = log_q_RY.scatter(1, answers.ids_RK, -torch.inf)
    log_q_R = torch.where(has_tail_R[:, None], others_RY, log_q_RY).logsumexp(-1)
    log_p_R = answers.log_tail_R.to(log_q_RY.dtype).masked_fill(~has_tail_R, 0.0)
    tail_R = log_p_R.exp() * (log_p_R - log_q_R)
    return kept_R + tail_R.masked_fill(~has_tail_R, 0.0)


class TaughtDocument(NamedTuple):
    """A document, and what the teacher said at its rows with a label, as arrays [R, K], [R, K] and [R]."""

    document: Document
    ids_RK: np.ndarray
    log_probs_RK: np.ndarray
    log_tail_R: np.ndarray


class TaughtBatch(NamedTuple):
    """A TrainBatch, and the teacher's answers at its rows with a label, in their order."""

    rows: TrainBatch
    answers: TeacherAnswers

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    @property
    def num_labels(self) -> int:
        return self.rows.num_labels

    @property
    def batch(self) -> Batch:
        return self.rows.batch

    def to(self, device: torch.device) -> TaughtBatch:
        return TaughtBatch(self.rows.to(device), TeacherAnswers(*(tensor.to(device) for tensor in self.answers)))


class TaughtKind:
    """Samples that are taught documents, and a TaughtBatch of them."""

    def num_rows(self, sample: TaughtDocument) -> int:
        return len(sample.document) - 1

    def pack(self, samples: Sequence[TaughtDocument]) -> TaughtBatch:
        rows = pack([DocumentRows(each.document, 0, len(each.document) - 1) for each in samples])
        ids, log_probs, tails = (np.concatenate(parts) for parts in zip(*(each[1:] for each in samples), strict=True))
        answers = TeacherAnswers(*(torch.from_numpy(each) for each in (ids.astype(np.int64), log_probs, tails)))
        assert len(answers.log_tail_R) == rows.num_labels
        return TaughtBatch(rows, answers)


TAUGHT = TaughtKind()


@dataclass(frozen=True)
class Distillation:
    """The objective of distillation: (1 - share) of the cross entropy of the labels, and share * temperature^2 of the
    divergence from the teacher, which was asked at the same temperature.

    `main` is the sum of both, the mean over the rows with a label of the whole step; `labels` and `teacher` are
    reported beside it, before their shares. The routers' losses are those of pretraining.
    """

    share: float = 1.0
    temperature: float = 1.0
    balance: float = 0.0  # coefficients
    z: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise UsageError(f"share must be between 0 and 1, not {self.share}")
        if not 0.0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be above zero, not {self.temperature}")

    def __call__(self, model: CausalLM, batch: TaughtBatch, step: TrainStep) -> Losses:
        hidden_TD, labels_T = model(batch.rows.batch).hidden_TD, batch.rows.labels_T
        is_learned_T = labels_T != IGNORED
        formula = partial(_both_losses, temperature=self.temperature)
        both_R2 = by_chunks(formula, model, hidden_TD[is_learned_T], labels_T[is_learned_T], *batch.answers)
        num_labels = max(1, sum(each.num_labels for each in step.batches))
        labels, teacher = both_R2.sum(0) / num_labels
        main = (1.0 - self.share) * labels + self.share * self.temperature**2 * teacher
        parts = {
            "main": LossPart(main),
            "labels": LossPart(labels.detach(), 0.0),
            "teacher": LossPart(teacher.detach(), 0.0),
        }
        return with_router_losses(parts, step.tap.take(), step, balance=self.balance, z=self.z)


def _both_losses(model: CausalLM, hidden_RD: Tensor, labels_R: Tensor, *answers: Tensor, temperature: float) -> Tensor:
    """[R, 2]: the cross entropy of the label, and the divergence from the teacher."""
    logits_RY = wide_logits(model, hidden_RD)
    labels = -logits_RY.log_softmax(-1).gather(1, labels_R[:, None]).squeeze(1)
    return torch.stack([labels, divergence(logits_RY, TeacherAnswers(*answers), temperature=temperature)], dim=-1)
