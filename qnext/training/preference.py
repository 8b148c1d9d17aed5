"""Direct preference optimisation (DPO, arXiv 2305.18290): a chosen answer becomes more likely than a rejected one.

Both answers of a pair are documents of one micro batch, which never see each other. What the reference model makes of
them never changes: it is computed once, before the run.

Legend: P pairs, 2 answers (chosen, rejected), T rows, R rows with a label, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM
from qnext.training.arrays import sound_file, write_arrays
from qnext.training.data import IGNORED, Document, DocumentRows, TrainBatch, pack
from qnext.training.losses import label_log_probs
from qnext.training.objective import Losses, LossPart, TrainStep, with_router_losses
from qnext.training.ranks import ALONE, TrainingRanks
from qnext.training.samples import Samples, in_order
from qnext.training.shards import DataShard

REFERENCES = ".reference"  # suffix of files beside the shards


class Pair(NamedTuple):
    """Two answers to one prompt, each behind it, and the sums of their log-probabilities under the reference."""

    chosen: Document
    rejected: Document
    reference: tuple[float, float] = (0.0, 0.0)


class PairBatch(NamedTuple):
    """The documents of P pairs, chosen before rejected, which of these a row is of, and what the reference makes of
    them."""

    rows: TrainBatch
    reference_P2: Tensor
    answers_T: Tensor

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    @property
    def batch(self) -> Batch:
        return self.rows.batch

    @property
    def num_pairs(self) -> int:
        return len(self.reference_P2)

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(self.rows.to(device), self.reference_P2.to(device), self.answers_T.to(device))

    def cut(self, ranks: TrainingRanks) -> PairBatch:
        """As TrainBatch.cut; of every pair."""
        own = slice(*ranks.rows(self.num_tokens))
        return self._replace(rows=self.rows.cut(ranks), answers_T=self.answers_T[own])


class PairKind:
    """Samples that are pairs, and a PairBatch of them."""

    def num_rows(self, sample: Pair) -> int:
        return len(sample.chosen) + len(sample.rejected) - 2

    def pack(self, samples: Sequence[Pair]) -> PairBatch:
        answers = [answer for pair in samples for answer in (pair.chosen, pair.rejected)]
        rows = pack([DocumentRows(answer, 0, len(answer) - 1) for answer in answers])
        lengths = torch.tensor(rows.batch.packing.lengths)
        answers_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return PairBatch(rows, torch.tensor([pair.reference for pair in samples], dtype=torch.float64), answers_T)


PAIRS = PairKind()


class AnswerScores(NamedTuple):
    """Of each answer: the sum of the log-probabilities of its learnt tokens, and their number."""

    sums_P2: Tensor
    counts_P2: Tensor


def answer_scores(model: CausalLM, batch: PairBatch) -> AnswerScores:
    """What the rows here give to the scores of the documents. Only rows with a label meet the head."""
    hidden_TD, labels_T, num_answers = model(batch.batch).hidden_TD, batch.rows.labels_T, 2 * batch.num_pairs
    is_learned_T = labels_T != IGNORED
    answers_R = batch.answers_T[is_learned_T]
    log_probs_R = label_log_probs(model, hidden_TD[is_learned_T], labels_T[is_learned_T])
    sums = log_probs_R.new_zeros(num_answers).index_add(0, answers_R, log_probs_R)
    return AnswerScores(sums.view(-1, 2), torch.bincount(answers_R, minlength=num_answers).view(-1, 2))


@torch.no_grad()
def reference_scores(model: CausalLM, pairs: Samples, *, tokens_per_batch: int) -> np.ndarray:
    """[P, 2] float64: the sums of log-probabilities under `model`. An adapter that has not begun to learn changes no
    bit of them."""
    found = [np.zeros((0, 2))]
    for batch in in_order((pairs[index] for index in range(len(pairs))), PAIRS, tokens_per_batch=tokens_per_batch):
        found.append(answer_scores(model, batch.to(model.device)).sums_P2.double().cpu().numpy())
    return np.concatenate(found)


class PairShard:
    """A shard of documents as pairs, with the scores [P, 2] of the reference."""

    def __init__(self, shard: DataShard, reference_P2: np.ndarray) -> None:
        assert len(shard) == 2 * len(reference_P2), shard.path
        self._shard, self._reference_P2 = shard, reference_P2

    def __len__(self) -> int:
        return len(self._reference_P2)

    def __getitem__(self, index: int) -> Pair:
        reference = (float(self._reference_P2[index, 0]), float(self._reference_P2[index, 1]))
        return Pair(self._shard[2 * index], self._shard[2 * index + 1], reference)


def with_reference(
    shard: DataShard, model: CausalLM, *, of: str, tokens_per_batch: int, ranks: TrainingRanks = ALONE
) -> PairShard:
    """A shard and its references, which stand in a file beside it, and are computed where they do not yet: by all
    `ranks` together, whose model may be cut.

    `of` tells the reference model from others. A file of another model or of other pairs is replaced.
    """
    path = shard.path.with_suffix(REFERENCES)
    facts = {"model": of, "pairs": shard.checksum}
    file = sound_file(path, facts) if ranks.is_first else None
    sums_P2: np.ndarray | None = ranks.gather_objects(None if file is None else file.arrays["sums"])[0]
    if sums_P2 is None:
        unknown = PairShard(shard, np.zeros((len(shard) // 2, 2)))
        sums_P2 = reference_scores(model, unknown, tokens_per_batch=tokens_per_batch)
        ranks.cut_again(model)
        arrays = {"sums": sums_P2}
        ranks.by_first(lambda: write_arrays(path, facts, arrays))
    return PairShard(shard, sums_P2)


@dataclass(frozen=True)
class DirectPreference:
    """The objective of DPO: `main` is -log sigmoid of `margin`, the mean over the pairs of the whole step.

    An answer's reward is beta times the sum over its tokens of log policy / reference, or with `by_length` their mean
    (as in arXiv 2405.14734, but with a reference); margin is the reward of the chosen answer less that of the rejected
    one. Reported beside it: the mean `margin`, the share of pairs whose margin is above zero (`right`), and the mean
    reward of the `chosen` answers, which falls where both answers become less likely.
    """

    beta: float = 0.1
    by_length: bool = False
    balance: float = 0.0  # coefficients
    z: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < float("inf"):
            raise UsageError(f"beta must be above zero, not {self.beta}")

    def rewards(self, model: CausalLM, batch: PairBatch, ranks: TrainingRanks = ALONE) -> Tensor:
        """[P, 2] of the answers. Of rows that are cut among `ranks` all have the rewards; the gradient of each goes to
        its own rows."""
        sums_P2, counts_P2 = answer_scores(model, batch)
        if ranks.num_cuts > 1:
            sums_P2 = sums_P2 + (ranks.add_cuts(sums_P2) - sums_P2.detach())
            counts_P2 = ranks.add_cuts(counts_P2)
        rewards_P2 = self.beta * (sums_P2 - batch.reference_P2.to(sums_P2.dtype))
        return rewards_P2 / counts_P2 if self.by_length else rewards_P2

    def __call__(self, model: CausalLM, batch: PairBatch, step: TrainStep) -> Losses:
        num_pairs = sum(each.num_pairs for each in step.batches)
        judged = judge(self.rewards(model, batch, step.ranks))
        num_told = num_pairs * step.ranks.num_cuts  # each process has all of a value, and what they tell is added up
        parts = {name: LossPart(value.detach() / num_told, 0.0) for name, value in judged._asdict().items()}
        parts["main"] = LossPart(judged.main / num_told, float(step.ranks.num_cuts))
        return with_router_losses(parts, step.tap.take(), step, balance=self.balance, z=self.z)


class Judged(NamedTuple):
    """Sums over pairs: see DirectPreference."""

    main: Tensor
    margin: Tensor
    right: Tensor
    chosen: Tensor


def judge(rewards_P2: Tensor) -> Judged:
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    right = (margins_P > 0).to(margins_P.dtype).sum()
    return Judged(-F.logsigmoid(margins_P).sum(), margins_P.sum(), right, rewards_P2[:, 0].sum())


@dataclass(frozen=True)
class HeldOutPreference:
    """Means over pairs that are not trained on: see DirectPreference."""

    loss: float
    margin: float
    right: float
    chosen: float
    num_pairs: int

    @property
    def cost(self) -> float:
        return self.loss

    @property
    def summary(self) -> str:
        return (
            f"held-out loss {self.loss:.4f}, margin {self.margin:.3f}, the chosen answer preferred in {self.right:.1%} "
            f"of {self.num_pairs} pairs, its reward {self.chosen:.3f}"
        )


@torch.no_grad()
def held_out_preference(
    model: CausalLM, objective: DirectPreference, pairs: Samples, *, tokens_per_batch: int, limit: int = 512
) -> HeldOutPreference:
    """Over the first `limit` pairs, packed as in training."""
    count = min(limit, len(pairs))
    totals = torch.zeros(len(Judged._fields), dtype=torch.float64)
    for batch in in_order((pairs[index] for index in range(count)), PAIRS, tokens_per_batch=tokens_per_batch):
        totals += torch.stack(judge(objective.rewards(model, batch.to(model.device)))).double().cpu()
    loss, margin, right, chosen = (totals / max(1, count)).tolist()
    return HeldOutPreference(loss, margin, right, chosen, count)
