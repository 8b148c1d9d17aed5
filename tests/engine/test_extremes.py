"""Every value that the parameters take, with any finite logits: a token comes out, and all numbers stay finite."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.engine.policy.params import (
    GREEDY_BELOW,
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from qnext.engine.policy.request import Request, SamplingParams
from qnext.engine.sampling.filters import draw
from qnext.engine.sampling.sampler import Window, draft, verify
from tests.engine.sampling import request

SIZES = (7, 41, 2_500)  # the last is read in groups
LARGEST = float(np.finfo(np.float32).max)
CORNERS: dict[str, list[Any]] = {
    "temperature": [0.0, 5e-324, 1e-40, GREEDY_BELOW, 1.0, MAX_TEMPERATURE],
    "top_p": [5e-324, 1e-40, 0.5, math.nextafter(1, 0), 1.0],
    "min_p": [0.0, 5e-324, 1e-40, 0.5, 1.0],
    "top_k": [-1, 0, 1, 6, 40, MAX_TOP_K],
    "repetition_penalty": [MIN_REPETITION_PENALTY, 1.0, MAX_REPETITION_PENALTY],
    "presence_penalty": [-MAX_PENALTY, 5e-324, 0.0, MAX_PENALTY],
    "frequency_penalty": [-MAX_PENALTY, 0.0, 1e-40, MAX_PENALTY],
    "logit_bias": [
        {},
        {0: 5e-324},
        dict.fromkeys(range(7), -MAX_BIAS),
        dict.fromkeys(range(7), MAX_BIAS),
        {1: 100, 2: -100},
    ],
    "allowed_token_ids": [None, (3,), (0, 5, 6)],
    "banned_token_ids": [(), (0, 1, 2)],
    "min_tokens": [0, 2**31],
    "logprobs": [None, 0, 5],
}
SCALES = (0.0, 1e-42, 1.0, 1e4, 1e30, LARGEST)


class AllowsFew:
    """Tokens 4, 5 and 6 alone."""

    def allowed(self) -> np.ndarray:
        return np.array([0b1110000] + [0] * 78, dtype=np.int32)[: -(-self.size // 32)]

    def accept(self, token_id: int) -> None:
        assert token_id in (4, 5, 6)

    def copy(self) -> AllowsFew:
        return self

    def __init__(self, size: int) -> None:
        self.size = size


def check(changes: dict[str, Any], scale: float, size: int, *, seed: int, is_guided: bool, num_drafts: int) -> None:
    if is_guided and changes.get("allowed_token_ids") == (3,):
        return  # nothing is left
    params = SamplingParams(**changes, seed=seed)
    generator = np.random.default_rng(seed)
    rows = np.clip(generator.standard_normal((num_drafts + 1, size)) * scale, -LARGEST, LARGEST).astype(np.float32)
    rows[:, 2] = -np.inf  # a model may rule out a token itself
    made = request(params, prompt=(0, 1, 5), output=[5] * 40 + [6, 4, 3, 2], stop=(1,))
    before = rows.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide = AllowsFew(size) if is_guided else None
        drafts = tuple(draft(torch.from_numpy(rows[:-1]), [made] * num_drafts, list(range(44, 44 + num_drafts))))
        (verdict,) = verify(torch.from_numpy(rows), [Window(made, drafts, guide)])
    assert verdict.failure is None and verdict.tokens, verdict.failure
    assert (rows == before).all()
    for token, row in zip(verdict.tokens, rows, strict=False):
        assert may_be(token.token_id, row, made, is_guided=is_guided)
        if params.logprobs is None:
            continue
        assert token.logprob is not None and token.logprob <= 1e-5 and not math.isnan(token.logprob)
        assert all(value <= 1e-5 for _, value in token.top_logprobs)


def may_be(token_id: int, row: np.ndarray, made: Request, *, is_guided: bool) -> bool:
    """Whether no rule forbids it: what weighs nothing beside others is not asked here."""
    params = made.params
    assert np.isfinite(row[token_id]), "a token that the model rules out"
    if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
        return False
    is_stop = token_id in made.stop_ids and params.min_tokens > 0
    return token_id not in params.banned_token_ids and not is_stop and (not is_guided or token_id in (4, 5, 6))


@pytest.mark.parametrize("scale", SCALES)
def test_corners_in_pairs(scale: float) -> None:
    """Every value of every parameter with every value of every other."""
    number = 0
    for first, second in itertools.combinations(CORNERS, 2):
        for one, other in itertools.product(CORNERS[first], CORNERS[second]):
            number += 1
            changes = {"temperature": (0.0, 1.0)[number % 2], first: one, second: other}
            check(changes, scale, SIZES[number % 2], seed=number, is_guided=number % 5 == 0, num_drafts=number % 3)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    changes=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CORNERS.items()}),
    scale=st.sampled_from(SCALES),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 10**6),
    is_guided=st.booleans(),
    num_drafts=st.integers(0, 3),
)
def test_corners_all_together(
    changes: dict[str, Any], scale: float, size: int, seed: int, is_guided: bool, num_drafts: int
) -> None:
    check(changes, scale, size, seed=seed, is_guided=is_guided, num_drafts=num_drafts)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    temperature=st.floats(GREEDY_BELOW, MAX_TEMPERATURE),
    top_p=st.floats(5e-324, 1.0),
    min_p=st.floats(0.0, 1.0),
    top_k=st.integers(-1, 50),
    number=st.sampled_from([0.0, 0.5, 1 - 2.0**-48]),
    row=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
)
def test_any_finite_row_gives_a_token_of_some_weight(
    temperature: float, top_p: float, min_p: float, top_k: int, number: float, row: list[float]
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    scores = np.array(row, dtype=np.float32)
    token_id = draw(scores, params, number)
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    assert 0 <= token_id < len(row) and weights[token_id] > 0
