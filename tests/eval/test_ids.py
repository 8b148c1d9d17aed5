"""Problems of token ids: the length to the token, answers that follow from the tokens, and scores of known models."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice, permutations

import numpy as np
import pytest
import torch

from qnext.errors import UsageError
from qnext.eval.ids import ID_TASKS, IGNORED, IdProblem, IdShape, id_batch, id_problems
from qnext.eval.ids.problem import ASK, BEGIN, SEPARATOR, SET
from qnext.eval.ids.scores import evaluate_ids
from qnext.model import Batch
from tests.training.models import VOCAB, tiny_model


def some(kind: str, shape: IdShape, count: int = 20, seed: str = "test") -> list[IdProblem]:
    return list(islice(id_problems(kind, shape, seed=seed), count))


@pytest.mark.parametrize("kind", ID_TASKS)
@pytest.mark.parametrize("length", [40, 97, 1000])
def test_the_length_is_hit_and_the_answers_are_among_the_tokens(kind: str, length: int) -> None:
    shape = IdShape(vocab_size=131, length=length, num_facts=4, num_queries=3)
    for problem in some(kind, shape, 5):
        assert len(problem.token_ids) == length and min(problem.token_ids) >= 0 and max(problem.token_ids) < 131
        assert list(problem.answer_places) == sorted(set(problem.answer_places))
        assert problem.prompt == problem.token_ids[: problem.answer_places[0]]
    assert some(kind, shape, 3) == some(kind, shape, 3)
    assert some(kind, shape, 3) != some(kind, shape, 3, seed="train")


@pytest.mark.parametrize("kind", ["needle", "multi-key", "multi-query", "multi-value"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, None])
def test_facts_answer_the_questions(kind: str, depth: float | None) -> None:
    for problem in some(kind, IdShape(300, 120, num_facts=5, num_queries=2, depth=depth)):
        ids, facts = problem.token_ids, defaultdict(list)
        end = ids.index(ASK)
        for place in (place for place in range(end) if ids[place] == SET):
            facts[ids[place + 1]].append(ids[place + 2])
        asked = [ids[place + 1] for place in range(end, len(ids)) if ids[place] == ASK]
        assert list(problem.answers) == [value for key in asked for value in facts[key]]
        if depth in (0.0, 1.0):
            first = next(place for place in range(end) if ids[place : place + 2] == (SET, asked[0]))
            assert first <= 3 * 5 if depth == 0 else kind == "multi-value" or first >= end - 3 * 5


def test_a_chain_leads_to_the_value() -> None:
    for problem in some("variables", IdShape(300, 100, num_facts=4)):
        ids, value_of = problem.token_ids, {}
        for place in (place for place in range(len(ids)) if ids[place] == SET):
            name, source = ids[place + 1 : place + 3]
            value_of[name] = value_of.get(source, source)
        assert len(value_of) == 8 and problem.answers == (value_of[ids[-2]],)


def test_a_pair_is_recalled() -> None:
    for problem in some("mqar", IdShape(96, 200, num_facts=9, num_queries=6)):
        ids = problem.token_ids
        begin = next(place for place, token in enumerate(ids) if token != BEGIN)
        pairs = dict(zip(ids[begin : begin + 18 : 2], ids[begin + 1 : begin + 18 : 2], strict=True))
        assert len(pairs) == 9 and len(problem.answers) == 6
        assert all(ids[place] == pairs[ids[place - 1]] for place in problem.answer_places)


def test_a_copy_and_a_sum() -> None:
    (copied,) = some("copy", IdShape(50, 42), 1)
    middle = copied.token_ids.index(SEPARATOR)
    assert copied.token_ids[middle - 20 : middle] == copied.answers
    (summed,) = some("addition", IdShape(14, 64), 1)
    ids = [token - 4 for token in summed.token_ids]
    split, end = ids.index(SET - 4), ids.index(SEPARATOR - 4)
    start = next(place for place, token in enumerate(ids) if token >= 0)
    left, right, total = (
        int("".join(map(str, part))) for part in (ids[start:split], ids[split + 1 : end], ids[end + 1 :])
    )
    assert left + right == total and split - start == 20


@pytest.mark.parametrize(("kind", "size"), [("s3", 3), ("s5", 5)])
def test_states_are_products(kind: str, size: int) -> None:
    elements = [np.array(element) for element in permutations(range(size))]
    for problem in some(kind, IdShape(124, 60, num_queries=4), 5):
        state = np.arange(size)
        for place, token in enumerate(problem.token_ids):
            if place in problem.answer_places:
                assert (elements[token - 4] == state).all()
            elif token >= 4:
                state = elements[token - 4][state]
        assert len(problem.answers) == 4 and problem.answer_places[-1] == 59


def test_parity() -> None:
    for problem in some("parity", IdShape(6, 31, num_queries=2)):
        bits = [token - 4 for token in problem.prompt if token >= 4]
        assert problem.answers[0] == 4 + sum(bits) % 2


def test_a_batch_asks_for_what_follows() -> None:
    shape = IdShape(96, 64, num_facts=4, num_queries=3)
    batch = id_batch("mqar", shape, 7, seed="test")
    assert batch.token_ids_NT.shape == batch.answer_ids_NT.shape == (7, 64)
    asked = batch.answer_ids_NT[:, :-1] != IGNORED
    assert (batch.answer_ids_NT[:, :-1][asked] == batch.token_ids_NT[:, 1:][asked]).all() and asked.sum() == 21


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UsageError, match="8 facts with 1 questions: 27 tokens are needed"):
        next(id_problems("multi-key", IdShape(300, 20, num_facts=8), seed=""))
    with pytest.raises(UsageError, match="token ids are needed"):
        next(id_problems("s5", IdShape(100, 20), seed=""))
    with pytest.raises(UsageError, match="did you mean needle"):
        next(id_problems("needel", IdShape(100, 20), seed=""))


def test_a_score_counts_what_the_model_finds_likeliest() -> None:
    """Built so that its tokens are the model's own greedy ones, a problem is solved; with one changed, it is not."""
    model = tiny_model()
    (problem,) = some("needle", IdShape(VOCAB, 30), 1)
    logits = model.logits(model(Batch.from_lengths(torch.tensor(problem.prompt), [len(problem.prompt)])).hidden_TD)
    best = int(logits[-1].argmax())
    right = IdProblem("needle", (*problem.prompt, best), problem.answer_places)
    wrong = IdProblem("needle", (*problem.prompt, (best + 1) % VOCAB), problem.answer_places)
    score = evaluate_ids(model, [right, wrong, right, right], tokens_per_batch=70)
    assert (score.exact.value, score.answers.value, score.num_problems) == (0.75, 0.75, 4)
    assert 0.3 < score.exact.low < 0.75 < score.exact.high < 1 and score.mean_rank > 1
    alone = evaluate_ids(model, [right])
    assert alone.mean_rank == 1 and alone.exact.high == 1
