"""Tokens that are drawn where the logits are equal those that the host draws, row by row."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, EngineConfig
from qnext.engine.policy.request import SamplingParams
from qnext.engine.sampling import sampler
from qnext.engine.sampling.sampler import Window, draft, verify
from tests.engine.models import tiny_model
from tests.engine.sampling import request

SIZES = (41, 512, 1500, 4099)


@pytest.fixture
def rows_that_left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Logits stay tensors, as on a GPU; sizes of the rows that the host asks for."""
    found: list[int] = []
    to_numpy = sampler._numpy

    def numpy(row_Y: Tensor | np.ndarray) -> np.ndarray:
        found.append(len(row_Y))
        return to_numpy(row_Y)

    monkeypatch.setattr(sampler, "_on_host", lambda logits_RY: logits_RY)
    monkeypatch.setattr(sampler, "_numpy", numpy)
    return found


def random_params(choose: random.Random) -> SamplingParams:
    """All filters alone and together; greedy and nearly so; with log-probabilities."""
    return SamplingParams(
        temperature=choose.choice([0.0, 1e-5, 0.3, 0.7, 1.0, 1.7]),
        top_k=choose.choice([0, 0, 1, 2, 20, 300, 10_000]),
        top_p=choose.choice([1.0, 1.0, 0.999, 0.9, 0.5, 1e-6]),
        min_p=choose.choice([0.0, 0.0, 0.02, 0.5, 1.0]),
        logprobs=choose.choice([None, None, None, 0, 3, 20]),
        seed=choose.randrange(1 << 40),
    )


def random_rows(count: int, vocab_size: int, seed: int) -> Tensor:
    """Sharp and flat ones, exact and with the many equal logits of bf16."""
    generator = torch.Generator().manual_seed(seed)
    rows_RY = torch.randn(count, vocab_size, generator=generator) * (10 ** torch.linspace(-1, 1.2, count))[:, None]
    rows_RY[1::3] = rows_RY[1::3].bfloat16().float()
    rows_RY[2::7, ::2] = -torch.inf
    return rows_RY


@pytest.mark.parametrize("vocab_size", SIZES)
def test_tokens_are_those_of_the_host(
    rows_that_left: list[int], monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    choose = random.Random(vocab_size)
    rows_RY = random_rows(400, vocab_size, vocab_size)
    windows = [Window(request(random_params(choose), output=range(choose.randrange(5)))) for _ in range(len(rows_RY))]
    ours = verify(rows_RY, windows)
    guesses = draft(rows_RY, [window.request for window in windows], [len(w.request.output_ids) for w in windows])
    assert len(rows_that_left) < len(rows_RY) / 5
    monkeypatch.undo()
    theirs = verify(rows_RY, windows)
    for mine, other, guess in zip(ours, theirs, guesses, strict=True):
        (token,), (expected,) = mine.tokens, other.tokens
        assert (token.token_id, [i for i, _ in token.top_logprobs]) == (
            expected.token_id,
            [i for i, _ in expected.top_logprobs],
        )
        assert guess == token.token_id
        if expected.logprob is not None:
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-6)
            assert [p for _, p in token.top_logprobs] == pytest.approx([p for _, p in expected.top_logprobs], abs=1e-6)


def test_windows_of_drafts_and_rows_that_are_not_finite(
    rows_that_left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0.8, top_k=20, seed=3)
    rows_RY = random_rows(9, 1500, 1)
    rows_RY[5, 7] = torch.nan
    made = [request(replace(params, seed=seed)) for seed in range(3)]
    right = verify(rows_RY[:1], [Window(made[0])])[0].tokens[0].token_id
    windows = [Window(made[0], (right, 1)), Window(made[1], (4, 5)), Window(made[2], (6, 7))]
    ours = verify(rows_RY, windows)
    assert len(ours[0].tokens) >= 2 and not rows_that_left
    monkeypatch.undo()
    theirs = verify(rows_RY, windows)
    assert [v.tokens for v in ours] == [v.tokens for v in theirs]
    assert [str(v.failure) for v in ours] == [str(v.failure) for v in theirs]
    bad = verify(rows_RY[5:6], [Window(made[1])])[0]
    assert bad.failure is not None


def test_what_changes_logits_is_the_hosts(rows_that_left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0.9, seed=1)
    changes = ({"logit_bias": {3: 5.0}}, {"presence_penalty": 0.5}, {"banned_token_ids": (4,)}, {"min_tokens": 3})
    made = [request(replace(params, **change), output=(1, 2), stop=(9,)) for change in changes]  # type: ignore[arg-type]
    rows_RY = random_rows(len(made), 600, 2)
    ours = verify(rows_RY, list(map(Window, made)))
    assert len(rows_that_left) == len(made)
    monkeypatch.undo()
    assert ours == verify(rows_RY, list(map(Window, made)))


def test_an_engine_gives_the_same_answers(rows_that_left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[tuple[int, ...]]:
        many = [
            SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.9, top_k=k, top_p=p, seed=k)
            for k, p in ((0, 1.0), (5, 0.9), (0, 0.8))
        ]
        with Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=3, max_model_len=64)) as engine:
            return [each.output_ids for each in engine.generate([[5, 6, 7]] * 3, many)]

    ours = answers()
    assert not rows_that_left
    monkeypatch.undo()
    assert ours == answers()
