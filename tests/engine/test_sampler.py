"""Sampling against definitions written out in numpy, and against its own promise of independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qnext.engine.policy.request import SamplingParams
from qnext.engine.sampling.filters import candidates, scaled
from qnext.engine.sampling.seeds import uniform
from tests.engine.sampling import VOCAB_SIZE, logits, request, sample


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_probabilities(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Token by token, in double precision."""
    p = softmax(row.astype(np.float64) / params.temperature)
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    mass, kept = 0.0, []
    for token in order:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += p[token]
    mask = np.zeros_like(p)
    mask[kept] = 1
    return p * mask / (p * mask).sum()


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.5, top_p=0.8),
    SamplingParams(temperature=1.2, min_p=0.1),
    SamplingParams(temperature=2.0, top_k=12, top_p=0.6, min_p=0.02),
    SamplingParams(temperature=0.3, top_k=1),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1e-5),
    SamplingParams(temperature=3.0, top_k=1000, min_p=1.0),
]


def probabilities(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    kept = candidates(row, params)
    if kept is None:
        return softmax(scaled(row, row.max(), params).astype(np.float64))
    found = np.zeros(len(row))
    assert (np.diff(kept.ids_C) > 0).all()
    found[kept.ids_C] = softmax(kept.scores_C.astype(np.float64))
    return found


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 5000])
@pytest.mark.parametrize("width", [0.01, 3.0])
def test_filters_are_their_definitions(vocab_size: int, width: float) -> None:
    rows = np.random.default_rng(vocab_size).standard_normal((len(PARAMS), vocab_size)).astype(np.float32) * width
    for row, params in zip(rows, PARAMS, strict=True):
        np.testing.assert_allclose(probabilities(row, params), reference_probabilities(row, params), atol=2e-6)


def test_ties_at_the_border_are_kept() -> None:
    def kept(row: list[float], **changes: float) -> list[int]:
        found = candidates(np.array(row, dtype=np.float32), SamplingParams(**{"temperature": 1.0, **changes}))  # type: ignore[arg-type]
        assert found is not None
        return found.ids_C.tolist()

    assert kept([1.0, 3.0, 3.0, 3.0, 0.0], top_k=2) == [1, 2, 3]
    assert kept([1.0, 3.0, 3.0, 3.0, 0.0], top_p=0.4) == [1, 2, 3]
    assert kept([1.0, 3.0, 3.0, 3.0, 0.0], min_p=1.0) == [1, 2, 3]
    # Logits that differ can tie once they are scaled.
    assert kept([2e35, 1e35, 5e34, 0.0], top_k=2, temperature=1e-5) == [0, 1, 2, 3]
    long = [0.0] * 5000
    long[7] = long[4999] = 2.0
    assert kept(long, top_k=2) == [7, 4999]
    assert kept(long, top_k=3) == list(range(5000))


def test_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.4, top_k=9, top_p=0.95, seed=11)
    row = logits(1, seed=5)
    num_draws = 20_000
    drawn = []
    for first in range(0, num_draws, 100):
        requests = [request(params) for _ in range(100)]
        for index, made in enumerate(requests):
            made.output_ids = range(first + index)  # type: ignore[assignment]
        drawn += [token.token_id for token in sample(row.expand(100, -1), requests)]
    expected = reference_probabilities(row[0].numpy(), params)
    observed = np.bincount(drawn, minlength=VOCAB_SIZE) / num_draws
    error = np.abs(observed - expected)
    # Five standard deviations of a binomial share.
    assert (error <= 5 * np.sqrt(expected * (1 - expected) / num_draws)).all(), error.max()


def test_uniform_numbers_are_uniform_and_streams_differ() -> None:
    draws = np.array([[uniform(seed, index) for index in range(200)] for seed in range(-50, 50)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(1000)
    correlation = np.corrcoef(draws)
    assert np.abs(correlation - np.eye(100)).max() < 0.4
    assert len(np.unique(draws)) == draws.size


def test_a_row_is_drawn_alike_in_any_company() -> None:
    scores = logits(len(PARAMS), seed=3)
    params = [SamplingParams(**{**vars(p), "seed": 100 + n}) for n, p in enumerate(PARAMS)]
    for num_output in range(8):
        requests = [request(p, output=(0,) * num_output) for p in params]
        together = sample(scores, requests)
        for n, one in enumerate(requests):
            assert sample(scores[n : n + 1], [one]) == [together[n]]
        backwards = sample(scores.flip(0), requests[::-1])
        assert backwards[::-1] == together


def test_greedy_is_argmax_also_beside_sampled_rows() -> None:
    scores = logits(3)
    requests = [request(SamplingParams()), request(SamplingParams(temperature=5.0)), request(SamplingParams())]
    tokens = sample(scores, requests)
    best = scores.argmax(-1).tolist()
    assert (tokens[0].token_id, tokens[2].token_id) == (best[0], best[2])
    assert [t.token_id for t in sample(scores, [request(SamplingParams())] * 3)] == best


def test_penalties_are_their_definitions() -> None:
    scores = torch.tensor([[2.0, -2.0, 1.5, 1.9, 0.0]])
    # repetition over prompt and output: token 0 falls from 2.0 to 1.0
    repeated = SamplingParams(repetition_penalty=2.0)
    assert sample(scores, [request(repeated, prompt=(0, 0))])[0].token_id == 3
    assert sample(scores, [request(repeated, prompt=(1,), output=(0, 3))])[0].token_id == 2
    # presence counts once, frequency each time, neither counts the prompt
    assert sample(scores, [request(SamplingParams(presence_penalty=0.2), output=(0, 0))])[0].token_id == 3
    assert sample(scores, [request(SamplingParams(presence_penalty=0.2), prompt=(0, 0))])[0].token_id == 0
    frequency = SamplingParams(frequency_penalty=0.08)
    assert sample(scores, [request(frequency, output=(0,))])[0].token_id == 0
    assert sample(scores, [request(frequency, output=(0, 0))])[0].token_id == 3
    # a penalised row does not touch its neighbour, nor the logits that came in
    before = scores.clone()
    both = sample(scores.expand(2, -1), [request(repeated, prompt=(0,)), request(SamplingParams())])
    assert [t.token_id for t in both] == [3, 0] and torch.equal(scores, before)


def test_negative_logits_are_pushed_down_by_the_repetition_penalty() -> None:
    scores = torch.tensor([[-1.0, -1.5]])
    assert sample(scores, [request(SamplingParams(repetition_penalty=2.0), prompt=(0,))])[0].token_id == 1


def test_logprobs_ignore_penalties_and_temperature() -> None:
    scores = logits(2)
    params = SamplingParams(temperature=0.5, top_k=2, repetition_penalty=3.0, logprobs=3, seed=1)
    token = sample(scores, [request(params, prompt=tuple(range(20))), request(SamplingParams())])[0]
    expected = scores[0].log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    assert [token_id for token_id, _ in token.top_logprobs] == expected.topk(3).indices.tolist()
    chosen_only = sample(scores[:1], [request(SamplingParams(logprobs=0))])[0]
    assert chosen_only.logprob == pytest.approx(float(expected.max())) and chosen_only.top_logprobs == ()
    everything = sample(scores[:1], [request(SamplingParams(logprobs=1000))])[0]
    assert len(everything.top_logprobs) == VOCAB_SIZE


def test_masked_tokens_are_never_drawn() -> None:
    scores = torch.full((1, VOCAB_SIZE), -math.inf)
    scores[0, [3, 40]] = torch.tensor([0.0, 0.5])
    params = SamplingParams(temperature=1.0, top_p=0.999, seed=2)
    drawn = {sample(scores, [request(params, output=(0,) * n)])[0].token_id for n in range(60)}
    assert drawn == {3, 40}
