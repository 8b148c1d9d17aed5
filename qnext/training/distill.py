"""Distillation from what a teacher said of the data beforehand: the largest of its probabilities, or samples of them.

The k largest probabilities and the mass of all others make a distribution whose divergence is a lower bound, biased
against rare tokens. Tokens drawn from the teacher's distribution give the full divergence and its gradient on average
(arXiv 2503.16870).

Legend: R rows with a label, K entries of a row, D hidden, Y vocabulary, L routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, RouterOutput
from qnext.training.config import TrainConfig
from qnext.training.data import IGNORED, Document, DocumentRows, TrainBatch, pack
from qnext.training.losses import by_chunks, stack_logits, wide_logits
from qnext.training.objective import Losses, LossPart, TrainStep, mtp_part, shared_terms, with_router_losses
from qnext.training.ranks import TrainingRanks
from qnext.training.samples import Samples, in_order

KeptTokens = Literal["top", "sampled"]


class TeacherAnswers(NamedTuple):
    """What is kept of a teacher's distribution at each of R rows, as tensors, or as arrays on disk.

    Of "top": the tokens of the K largest probabilities and these as logarithms, and that of the mass of all others
    (-inf for none). Of "sampled": K drawn tokens, which may be equal, each with the logarithm of 1/K, and -inf. `known`
    is the part of the divergence that no student changes: of drawn tokens ln K less the teacher's entropy, else 0.
    """

    ids_RK: Any
    log_probs_RK: Any
    log_tail_R: Any
    known_R: Any

    def of(self, rows: Any) -> TeacherAnswers:
        return TeacherAnswers(*(each[rows] for each in self))


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
    none = log_probs_RY.new_full((num_rows,), -torch.inf)
    if kept == "sampled":
        probs_RY = log_probs_RY.exp()
        ids_RK = torch.multinomial(probs_RY, count, replacement=True, generator=generator)
        even = log_probs_RY.new_full((num_rows, count), 1.0 / count).log()
        entropy_R = torch.special.entr(probs_RY).sum(-1)
        return TeacherAnswers(ids_RK, even, none, math.log(count) - entropy_R)
    log_probs_RK, ids_RK = log_probs_RY.topk(count, dim=-1)
    others_R = none
    if count < num_tokens:
        others_R = log_probs_RY.scatter(1, ids_RK, -torch.inf).logsumexp(-1)
    return TeacherAnswers(ids_RK, log_probs_RK, others_R, torch.zeros_like(none))


def divergence(logits_RY: Tensor, answers: TeacherAnswers, *, temperature: float = 1.0) -> Tensor:
    """[R] KL(teacher || student) of what is kept, all other tokens as one. Of drawn tokens it and its gradient are, on
    average, those of the full divergence."""
    log_q_RY = (logits_RY / temperature).log_softmax(-1)
    log_p_RK = answers.log_probs_RK.to(log_q_RY.dtype)
    kept_R = (log_p_RK.exp() * (log_p_RK - log_q_RY.gather(1, answers.ids_RK))).sum(-1)
    kept_R = kept_R + answers.known_R.to(log_q_RY.dtype)
    has_tail_R = answers.log_tail_R > -torch.inf
    if not has_tail_R.any():
        return kept_R
    others_RY = log_q_RY.scatter(1, answers.ids_RK, -torch.inf)
    log_q_R = torch.where(has_tail_R[:, None], others_RY, log_q_RY).logsumexp(-1)
    log_p_R = answers.log_tail_R.to(log_q_RY.dtype).masked_fill(~has_tail_R, 0.0)
    tail_R = log_p_R.exp() * (log_p_R - log_q_R)
    return kept_R + tail_R.masked_fill(~has_tail_R, 0.0)


class TaughtDocument(NamedTuple):
    """A document, and what the teacher said at its rows with a label, as arrays: of the next token, and where it was
    asked, of the experts of each router, [R, L, ...]."""

    document: Document
    answers: TeacherAnswers
    routers: TeacherAnswers | None = None


class TaughtBatch(NamedTuple):
    """A TrainBatch, and the teacher's answers at its rows with a label, in their order. Of rows that are cut among
    processes those with a label here have the answers `own`."""

    rows: TrainBatch
    answers: TeacherAnswers
    routers: TeacherAnswers | None = None
    own: slice = slice(0, None)

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    @property
    def num_labels(self) -> int:
        return self.rows.num_labels

    @property
    def num_mtp_labels(self) -> int:
        return self.rows.num_mtp_labels

    @property
    def batch(self) -> Batch:
        return self.rows.batch

    def to(self, device: torch.device) -> TaughtBatch:
        answers, routers = (
            None if each is None else TeacherAnswers(*(tensor.to(device) for tensor in each))
            for each in (self.answers, self.routers)
        )
        assert answers is not None
        return self._replace(rows=self.rows.to(device), answers=answers, routers=routers)

    def cut(self, ranks: TrainingRanks) -> TaughtBatch:
        """As TrainBatch.cut."""
        start, end = ranks.rows(self.num_tokens)
        before, here = (
            int((labels_T != IGNORED).sum()) for labels_T in self.rows.labels_T[:end].split([start, end - start])
        )
        return self._replace(rows=self.rows.cut(ranks), own=slice(before, before + here))


class TaughtKind:
    """Samples that are taught documents, and a TaughtBatch of them."""

    def num_rows(self, sample: TaughtDocument) -> int:
        return len(sample.document) - 1

    def pack(self, samples: Sequence[TaughtDocument]) -> TaughtBatch:
        rows = pack([DocumentRows(each.document, 0, len(each.document) - 1) for each in samples])
        answers = _joined([each.answers for each in samples])
        assert len(answers.log_tail_R) == rows.num_labels
        routers = [each.routers for each in samples if each.routers is not None]
        return TaughtBatch(rows, answers, _joined(routers) if routers else None)


def _joined(answers: Sequence[TeacherAnswers]) -> TeacherAnswers:
    ids, *others = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    return TeacherAnswers(*(torch.from_numpy(each) for each in (ids.astype(np.int64), *others)))


TAUGHT = TaughtKind()


@dataclass(frozen=True)
class Distillation:
    """The objective of distillation: (1 - share) of the cross entropy of the labels, and share * temperature^2 of the
    divergence from the teacher, which was asked at the same temperature.

    `main` is the sum of both, the mean over the rows with a label of the whole step; `labels` and `teacher` are
    reported beside it, before their shares. `mtp` is the same sum for the MTP module, whose teacher is what the trunk
    of the teacher said one row later: of the same token, after the same tokens. `router` is the mean divergence of the
    routers' choice of experts. The routers' other losses are those of pretraining.
    """

    share: float = 1.0
    temperature: float = 1.0
    balance: float = 0.0  # coefficients
    z: float = 0.0
    mtp: float = 0.0  # 0: the MTP module does not run
    router: float = field(default=0.0, kw_only=True)
    mtp_start: float = field(default=0.0, kw_only=True)
    mtp_steps: int = field(default=1, kw_only=True)
    detach_trunk: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise UsageError(f"share must be between 0 and 1, not {self.share}")
        if not 0.0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be above zero, not {self.temperature}")
        if not 0.0 <= self.router < float("inf"):
            raise UsageError(f"router must be zero or more, not {self.router}")

    def with_coefficients(self, config: TrainConfig) -> Distillation:
        """With what a run sets for every objective."""
        return replace(self, **shared_terms(config))

    def __call__(self, model: CausalLM, batch: TaughtBatch, step: TrainStep) -> Losses:
        rows, trunk = batch.rows, model(batch.rows.batch)
        labels_T, is_learned_T = rows.labels_T, rows.labels_T != IGNORED
        num_labels = max(1, sum(each.num_labels for each in step.batches))
        answers = batch.answers.of(batch.own)
        sums_2 = self.sums(model, trunk.hidden_TD[is_learned_T], labels_T[is_learned_T], answers)
        labels, teacher = (sums_2 / num_labels).detach()
        parts = {
            "main": LossPart(self.mixed(sums_2) / num_labels),
            "labels": LossPart(labels, 0.0),
            "teacher": LossPart(teacher, 0.0),
        }
        outputs = step.tap.take()
        if self.router > 0.0 and batch.routers is not None:
            found = _router_divergence(outputs, is_learned_T, batch.routers.of(batch.own)) / num_labels
            parts["router"] = LossPart(found, self.router)
        more, seen = mtp_part(self, model, trunk, rows, step, lambda draft_TD: self._of_drafts(model, draft_TD, batch))
        parts |= more
        outputs += seen
        return with_router_losses(parts, outputs, step, balance=self.balance, z=self.z)

    def sums(self, model: CausalLM, hidden_RD: Tensor, labels_R: Tensor, answers: TeacherAnswers) -> Tensor:
        """[2]: sums over rows of the cross entropy of the labels, and of the divergence from the teacher."""
        formula = partial(_both_losses, temperature=self.temperature)
        return by_chunks(formula, model, hidden_RD, labels_R, *answers).sum(0)

    def mixed(self, sums_2: Tensor) -> Tensor:
        """What is minimised, of both losses."""
        labels, teacher = sums_2
        return (1.0 - self.share) * labels + self.share * self.temperature**2 * teacher

    def _of_drafts(self, model: CausalLM, draft_TD: Tensor, batch: TaughtBatch) -> Tensor:
        """The sum over rows with an MTP label. The teacher's row for it is the next one, which has the same label, and
        may be another process's."""
        labels_T = batch.rows.mtp_labels_T
        at = torch.nonzero(labels_T != IGNORED).squeeze(1)
        # The next row has the answer behind those of the rows up to this one.
        place_T = batch.own.start + (batch.rows.labels_T != IGNORED).cumsum(0)
        return self.mixed(self.sums(model, draft_TD[at], labels_T[at], batch.answers.of(place_T[at])))


def _both_losses(model: CausalLM, hidden_RD: Tensor, labels_R: Tensor, *answers: Tensor, temperature: float) -> Tensor:
    """[R, 2]: the cross entropy of the label, and the divergence from the teacher."""
    logits_RY = wide_logits(model, hidden_RD)
    labels = -logits_RY.log_softmax(-1).gather(1, labels_R[:, None]).squeeze(1)
    return torch.stack([labels, divergence(logits_RY, TeacherAnswers(*answers), temperature=temperature)], dim=-1)


def _router_divergence(outputs: Sequence[RouterOutput], is_learned_T: Tensor, routers: TeacherAnswers) -> Tensor:
    """The sum over rows with a label of the mean over routers."""
    logits_RLE = stack_logits(outputs)[:, is_learned_T].transpose(0, 1)
    num_routers = logits_RLE.shape[1]
    assert routers.log_tail_R.shape[1] == num_routers
    flat = TeacherAnswers(*(each.flatten(0, 1) for each in routers))
    return divergence(logits_RLE.flatten(0, 1), flat).sum() / num_routers


@dataclass(frozen=True)
class HeldOutTeaching:
    """In nats per learnt token: the loss of the labels, the divergence from the teacher's kept answers, and their sum
    that is minimised."""

    loss: float
    teacher: float
    cost: float
    num_samples: int
    num_learned: int

    @property
    def summary(self) -> str:
        return (
            f"held-out loss {self.loss:.4f}, divergence from the teacher {self.teacher:.4f} ({self.num_samples} "
            f"samples, {self.num_learned} tokens)"
        )


@torch.no_grad()
def held_out_teaching(
    model: CausalLM, objective: Distillation, samples: Samples, *, tokens_per_batch: int, limit: int = 512
) -> HeldOutTeaching:
    """Over the first `limit` taught documents, packed as in training."""
    totals, num_learned, count = torch.zeros(2, dtype=torch.float64), 0, min(limit, len(samples))
    for batch in in_order((samples[index] for index in range(count)), TAUGHT, tokens_per_batch=tokens_per_batch):
        batch = batch.to(model.device)
        labels_T = batch.rows.labels_T
        at = labels_T != IGNORED
        totals += objective.sums(model, model(batch.batch).hidden_TD[at], labels_T[at], batch.answers).double().cpu()
        num_learned += batch.num_labels
    means = totals / max(1, num_learned)
    loss, teacher = means.tolist()
    return HeldOutTeaching(loss, teacher, float(objective.mixed(means)), count, num_learned)
