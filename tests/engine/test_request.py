"""Parameters and prompts are checked once, where they come in."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from qnext.engine.policy.request import SamplingParams, checked_prompt, output_allowance
from qnext.errors import DoesNotFit, UsageError

IMPOSSIBLE: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, "1", True, None, 100.5, 1e308, 10**400, "x" * 100_000],
    "top_k": [-2, 1.5, True, 10**9 + 1],
    "top_p": [0.0, 1.01, math.nan],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, math.inf, 1e-40, 0.0099, 10.01, 1e308],
    "max_tokens": [2**31 + 1, 0, 1.0],
    "min_tokens": [2**31 + 1, -1, None, 2.0],
    "logit_bias": [
        {1: 10**400},
        [1],
        None,
        {"1": 1.0},
        {-1: 1.0},
        {1: 100.5},
        {1: math.nan},
        {1: "2"},
        {1: True},
        dict.fromkeys(range(1025), 1.0),
    ],
    "presence_penalty": [2.5],
    "frequency_penalty": [-2.5],
    "seed": [1.0, 2**64],
    "logprobs": [-1, True, 1025],
    "stop_token_ids": [(1, -1), ("a",), 5, "12", range(1025)],
    "ignore_eos": [1],
    "prompt_logprobs": [-1, 21, 1.0],
    "n": [0, 129, None, True],
    "allowed_token_ids": [(), (-1,), (1.0,), range(1025)],
    "banned_token_ids": [None, {1: 2}, (True,), range(1025)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_impossible_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_thousands_of_digits_are_named_and_not_repeated() -> None:
    huge = 10**5000  # too long for a test's name, and for Python to write in decimal
    for changes in (
        {"temperature": huge},
        {"top_k": huge},
        {"seed": -huge},
        {"n": huge},
        {"logit_bias": {-huge: 1}},
        {"logit_bias": {huge: 101}},
        {"logit_bias": {1: huge}},
        {"stop_token_ids": (-huge,)},
    ):
        with pytest.raises(UsageError, match=next(iter(changes))) as caught:
            SamplingParams(**changes)
        assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match="logit_bias: token a very large int"):
        SamplingParams(logit_bias={huge: 1}).check_vocabulary(vocab_size=5, stop_ids=())


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=100, repetition_penalty=10, min_p=5e-324, max_tokens=2**31, min_tokens=2**31)
    assert SamplingParams(temperature=9e-6).is_greedy and not SamplingParams(temperature=1e-5).is_greedy
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63))
    SamplingParams(temperature=1e-30, top_k=10**9, top_p=5e-324, repetition_penalty=0.01, max_tokens=1, logprobs=0)


def test_lists_are_taken_over() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias, allowed_token_ids=[1, 2], banned_token_ids=[2], stop_token_ids=[3])  # type: ignore[arg-type]
    bias[1] = 50.0
    assert params.logit_bias == {1: 2.0} and params.allowed_token_ids == (1, 2)
    assert (params.banned_token_ids, params.stop_token_ids) == ((2,), (3,))
    assert hash(params) == hash(replace(params, seed=None)) and params != replace(params, logit_bias={})
    SamplingParams(logit_bias={0: -100, 1: 100.0}, n=128, prompt_logprobs=20, min_tokens=5, max_tokens=5, logprobs=1024)


def test_contradictions_are_named() -> None:
    with pytest.raises(UsageError, match="min_tokens 3 exceeds max_tokens 2"):
        SamplingParams(min_tokens=3, max_tokens=2)
    with pytest.raises(UsageError, match="banned_token_ids leaves nothing of allowed_token_ids"):
        SamplingParams(allowed_token_ids=(1, 2), banned_token_ids=(2, 1))

    def check(params: SamplingParams, *stop_ids: int) -> None:
        params.check_vocabulary(vocab_size=4, stop_ids=stop_ids)

    for name, value in (("logit_bias", {4: 1.0}), ("allowed_token_ids", (4,)), ("banned_token_ids", (4,))):
        with pytest.raises(UsageError, match=f"{name}: token 4"):
            check(SamplingParams(**{name: value}))
    with pytest.raises(UsageError, match="banned_token_ids leaves no token"):
        check(SamplingParams(banned_token_ids=(0, 1, 2, 3)))
    for lists in (
        {"banned_token_ids": (0, 1)},
        {"allowed_token_ids": (2, 3)},
        {"allowed_token_ids": (1, 2, 3), "banned_token_ids": (1,)},
    ):
        check(SamplingParams(min_tokens=1, **lists), 2, 99)
        check(SamplingParams(**lists), 2, 3)
        with pytest.raises(UsageError, match="min_tokens 1"):
            check(SamplingParams(min_tokens=1, **lists), 2, 3, 99)


def test_prompts() -> None:
    assert checked_prompt([0, 4], vocab_size=5) == (0, 4)
    for prompt in ([], [5], [0, -1], [1.0], "12"):
        with pytest.raises(UsageError, match="prompt"):
            checked_prompt(prompt, vocab_size=5)  # type: ignore[arg-type]


def test_allowance() -> None:
    assert output_allowance(6, SamplingParams(), max_model_len=10) == 4
    assert output_allowance(6, SamplingParams(max_tokens=4), max_model_len=10) == 4
    with pytest.raises(DoesNotFit, match="max_tokens 4 would fit"):
        output_allowance(6, SamplingParams(max_tokens=5), max_model_len=10)
    with pytest.raises(DoesNotFit, match="min_tokens 4 would fit"):
        output_allowance(6, SamplingParams(min_tokens=5), max_model_len=10)
    with pytest.raises(DoesNotFit, match="at most 9 tokens"):
        output_allowance(10, SamplingParams(), max_model_len=10)
