"""How well a model answers problems of token ids: its most likely token at each answer, all answers before it given.

For problems whose answer ends them this is greedy decoding. Legend: T tokens, R rows, D hidden, Y vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qnext.errors import UsageError
from qnext.eval.ids.problem import IdProblem
from qnext.eval.intervals import Interval, wilson
from qnext.model import Batch, CausalLM


@dataclass(frozen=True)
class IdScore:
    """`exact`: problems all of whose answers are right. `answers`: single answers. The intervals are Wilson's at 95 %;
    for `answers` they are too narrow where answers of one problem fail together.

    `mean_rank` is 1 where the right token is the most likely of all.
    """

    kind: str
    length: int
    num_problems: int
    exact: Interval
    answers: Interval
    nats_per_answer: float
    mean_rank: float


@torch.no_grad()
def evaluate_ids(model: CausalLM, problems: Sequence[IdProblem], *, tokens_per_batch: int = 16384) -> IdScore:
    """The score of problems of one kind and length."""
    if not problems:
        raise UsageError("no problems")
    per_batch = max(1, tokens_per_batch // len(problems[0].token_ids))
    num_exact = num_right = num_answers = 0
    nats = ranks = 0.0
    for start in range(0, len(problems), per_batch):
        some = problems[start : start + per_batch]
        lengths = [len(problem.token_ids) - 1 for problem in some]
        inputs_T = torch.tensor([token for problem in some for token in problem.token_ids[:-1]], device=model.device)
        hidden_TD = model(Batch.from_lengths(inputs_T, lengths)).hidden_TD
        for problem, rows_TD in zip(some, hidden_TD.split(lengths), strict=True):
            places = torch.tensor(problem.answer_places, device=model.device)
            log_probs_RY = model.logits(rows_TD[places - 1]).float().log_softmax(-1)
            targets_R = torch.tensor(problem.answers, device=model.device)
            chosen_R = log_probs_RY.gather(1, targets_R[:, None])
            rank_R = 1 + (log_probs_RY > chosen_R).sum(-1)
            is_right_R = log_probs_RY.argmax(-1) == targets_R
            num_exact += bool(is_right_R.all())
            num_right += int(is_right_R.sum())
            num_answers += len(targets_R)
            nats -= float(chosen_R.sum())
            ranks += float(rank_R.sum())
    return IdScore(
        kind=problems[0].kind,
        length=len(problems[0].token_ids),
        num_problems=len(problems),
        exact=wilson(num_exact, len(problems)),
        answers=wilson(num_right, num_answers),
        nats_per_answer=nats / num_answers if math.isfinite(nats) else math.inf,
        mean_rank=ranks / num_answers,
    )
