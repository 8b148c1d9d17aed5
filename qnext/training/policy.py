"""Group sequence policy optimisation (GSPO, arXiv 2507.18071): answers with a reward above the mean of their group
become more likely.

Answers come with the log-probabilities and the experts that their tokens had when they were drawn (rollouts). The
forward here has the bits of inference, so before the first update both sides agree exactly (ops.inference_forward).

Legend: N answers, T rows, R rows with a label, D hidden, L routers, A experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.errors import QnextError, UsageError
from qnext.model import CausalLM, RouterOutput
from qnext.ops import inference_forward, token_log_probs
from qnext.training.data import IGNORED, Document, DocumentRows, TrainBatch, pack
from qnext.training.losses import by_chunks
from qnext.training.objective import Losses, LossPart, TrainStep, with_router_losses


class MismatchTooLarge(QnextError):
    """Training and rollouts disagree about the model: what would be learnt is noise."""


class Rollout(NamedTuple):
    """An answer behind its prompt. `log_probs` are those of the answer's tokens when they were drawn."""

    document: Document  # tokens of the prompt are not learnt
    log_probs: NDArray[np.float64]
    advantage: float
    routing: NDArray[np.int64] | None = None  # [rows, L, A]
    reference: NDArray[np.float64] | None = None  # log-probabilities of the same tokens under the reference


class PolicyBatch(NamedTuple):
    """The rollouts of a micro batch, packed. None sees another."""

    rows: TrainBatch
    log_probs_R: Tensor  # fp64
    advantages_N: Tensor  # fp64
    routing: Mapping[int, Tensor] = {}  # int64 [T, A] of each sparse layer
    reference_R: Tensor | None = None
    is_first: bool = False  # no update lies between the rollouts and this batch
    facts: Mapping[str, float] = {}  # of the rollouts, reported once: by the first of their batches

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    @property
    def num_answers(self) -> int:
        return len(self.advantages_N)

    def to(self, device: torch.device) -> PolicyBatch:
        return self._replace(
            rows=self.rows.to(device),
            log_probs_R=self.log_probs_R.to(device),
            advantages_N=self.advantages_N.to(device),
            routing={layer: experts.to(device) for layer, experts in self.routing.items()},
            reference_R=None if self.reference_R is None else self.reference_R.to(device),
        )


def pack_rollouts(
    rollouts: Sequence[Rollout],
    sparse_layers: Sequence[int] = (),
    *,
    is_first: bool = False,
    facts: Mapping[str, float] | None = None,
) -> PolicyBatch:
    """One micro batch. `sparse_layers` are those that the routing of the rollouts is about."""
    rows = pack([DocumentRows(each.document, 0, len(each.document) - 1) for each in rollouts])
    known = [each.routing for each in rollouts if each.routing is not None]
    routing = {}
    if known:
        routing_TLA = torch.from_numpy(np.concatenate(known))
        routing = {layer: routing_TLA[:, n].contiguous() for n, layer in enumerate(sparse_layers)}
    references = [each.reference for each in rollouts if each.reference is not None]
    return PolicyBatch(
        rows,
        torch.from_numpy(np.concatenate([each.log_probs for each in rollouts])),
        torch.tensor([each.advantage for each in rollouts], dtype=torch.float64),
        routing,
        torch.from_numpy(np.concatenate(references)) if references else None,
        is_first,
        facts or {},
    )


def group_advantages(rewards: Sequence[float]) -> list[float] | None:
    """(reward - mean) / standard deviation within a group of answers to one prompt; None where all are alike."""
    values = np.asarray(rewards, dtype=np.float64)
    spread = float(values.std())
    return None if spread == 0.0 else ((values - values.mean()) / spread).tolist()


class Scores(NamedTuple):
    """Of each learnt token: its log-probability, and the entropy of the distribution that it was drawn from."""

    log_probs_R: Tensor
    entropies_R: Tensor


def token_scores(model: CausalLM, hidden_TD: Tensor, labels_T: Tensor) -> Scores:
    """Only rows with a label meet the head, as many at a time as have a million logits."""
    is_learned_T = labels_T != IGNORED
    found_R2 = by_chunks(_scores, model, hidden_TD[is_learned_T], labels_T[is_learned_T])
    return Scores(found_R2[:, 0], found_R2[:, 1].detach())


def _scores(model: CausalLM, hidden_RD: Tensor, labels_R: Tensor) -> Tensor:
    with inference_forward():  # here, for it runs again in backward
        logits_RY = model.logits(hidden_RD)
    log_probs_RY = logits_RY.detach().log_softmax(-1)
    entropies_R = -(log_probs_RY.exp() * log_probs_RY).sum(-1)
    return torch.stack([token_log_probs(logits_RY, labels_R), entropies_R.double()], 1)


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of GSPO: `main` is -mean over the answers of the whole step of min(s A, clip(s) A).

    s is exp of the mean over an answer's tokens of log policy / rollout, A its advantage. `kl` weighs the mean over the
    tokens of the step of KL(policy || reference), by the estimator k3. Reported beside it: the mean `entropy` of the
    tokens, the share of `clipped` answers, and before the first update the train-serve mismatch: of
    |log policy - log rollout| the mean and the maximum, their KL, and the share of tokens with other experts in any
    layer. A maximum above `max_mismatch` raises MismatchTooLarge. `replays` takes the experts of the rollouts.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kl: float = 0.0
    replays: bool = True
    max_mismatch: float | None = None
    balance: float = 0.0  # coefficients
    z: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 < self.clip_low < 1.0 and 0.0 < self.clip_high < float("inf")):
            raise UsageError(f"clip_low and clip_high must be above zero, not {self.clip_low} and {self.clip_high}")
        if not 0.0 <= self.kl < float("inf"):
            raise UsageError(f"kl must be zero or more, not {self.kl}")
        if self.max_mismatch is not None and not self.max_mismatch >= 0.0:
            raise UsageError(f"max_mismatch must be zero or more, not {self.max_mismatch}")

    def __call__(self, model: CausalLM, batch: PolicyBatch, step: TrainStep) -> Losses:
        rows = batch.rows
        inputs = replace(rows.batch, routing=batch.routing) if self.replays else rows.batch
        with inference_forward():
            hidden_TD = model(inputs).hidden_TD
        outputs = step.tap.take()
        scores = token_scores(model, hidden_TD, rows.labels_T)
        num_answers = sum(each.num_answers for each in step.batches)
        num_tokens = sum(each.rows.num_labels for each in step.batches)
        difference_R = scores.log_probs_R - batch.log_probs_R
        ratio_N = mean_by_answer(difference_R, rows).exp()
        surrogate_N, is_clipped_N = self.surrogate(ratio_N, batch.advantages_N)
        parts = {
            "main": LossPart(-surrogate_N.sum() / num_answers),
            "entropy": LossPart(scores.entropies_R.sum() / num_tokens, 0.0),
            "clipped": LossPart(is_clipped_N.double().sum() / num_answers, 0.0),
        }
        if batch.reference_R is not None:
            parts["kl"] = LossPart(k3(scores.log_probs_R - batch.reference_R).sum() / num_tokens, self.kl)
        if batch.is_first:
            parts |= self._mismatch(difference_R.detach(), batch, outputs, num_tokens)
        names = dict.fromkeys(name for each in step.batches for name in each.facts)  # all micro batches report the same
        facts = {name: torch.tensor(batch.facts.get(name, 0.0), dtype=torch.float64) for name in names}
        parts |= {name: LossPart(value, 0.0) for name, value in facts.items()}
        return with_router_losses(parts, outputs, step, balance=self.balance, z=self.z)

    def surrogate(self, ratio_N: Tensor, advantages_N: Tensor) -> tuple[Tensor, Tensor]:
        """What is maximised for each answer, and whether its ratio was clipped, so that it has no gradient."""
        clipped_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        plain_N, clipped_N = ratio_N * advantages_N, clipped_N * advantages_N
        return torch.minimum(plain_N, clipped_N), clipped_N < plain_N

    def _mismatch(
        self, difference_R: Tensor, batch: PolicyBatch, outputs: Sequence[RouterOutput], num_tokens: int
    ) -> dict[str, LossPart]:
        largest = difference_R.abs().max()
        if self.max_mismatch is not None and not float(largest) <= self.max_mismatch:
            raise MismatchTooLarge(
                f"a token of a rollout has a log-probability that training computes {float(largest):.3g} away from it; "
                f"max_mismatch is {self.max_mismatch:g}"
            )
        found = {
            "mismatch": LossPart(difference_R.abs().sum() / num_tokens, 0.0),
            "mismatch_max": LossPart(largest, 0.0, is_maximum=True),
            "mismatch_kl": LossPart(k3(-difference_R).sum() / num_tokens, 0.0),
        }
        if outputs and batch.routing:
            found["routing_differs"] = LossPart(other_experts(outputs, batch).sum() / num_tokens, 0.0)
        return found


def mean_by_answer(values_R: Tensor, rows: TrainBatch) -> Tensor:
    """[N]: the mean over the learnt tokens of each answer."""
    lengths = torch.tensor(rows.batch.packing.lengths, device=values_R.device)
    answers_T = torch.repeat_interleave(torch.arange(len(lengths), device=values_R.device), lengths)
    answers_R = answers_T[rows.labels_T != IGNORED]
    sums_N = values_R.new_zeros(len(lengths)).index_add(0, answers_R, values_R)
    return sums_N / torch.bincount(answers_R, minlength=len(lengths))


def k3(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(p || q) from a token of p that is never negative, with log_ratio = log p - log q."""
    return torch.expm1(-log_ratio) + log_ratio


def other_experts(outputs: Sequence[RouterOutput], batch: PolicyBatch) -> Tensor:
    """[R] fp64: 1 where a router of this forward chooses other experts than at the rollout, in any order."""
    differs_T = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.log_probs_R.device)
    for output, recorded_TA in zip(outputs, batch.routing.values(), strict=True):
        own_TA = output.logits_TE.detach().topk(recorded_TA.shape[1], dim=-1).indices
        differs_T |= (own_TA.sort(-1).values != recorded_TA.sort(-1).values).any(-1)
    return differs_T[batch.rows.labels_T != IGNORED].double()
