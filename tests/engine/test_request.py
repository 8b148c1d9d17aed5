"""Parameters and prompts are checked once, where they come in."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from qnext.engine.request import SamplingParams, checked_prompt, output_allowance
from qnext.errors import DoesNotFit, UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("temperature", True), ("temperature", None), ("top_k", -2), ("top_k", 1.5), ("top_k", True),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("repetition_penalty", 1e-40),
        ("repetition_penalty", 0.0099), ("repetition_penalty", 10.01), ("repetition_penalty", 1e308),
        ("temperature", 100.5), ("temperature", 1e308), ("temperature", 10**400),
        ("top_k", 10**9 + 1), ("max_tokens", 2**31 + 1), ("min_tokens", 2**31 + 1),
        ("logit_bias", {1: 10**400}),
        ("temperature", "x" * 100_000), ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5), ("seed", 1.0), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", 1.0),
        ("logprobs", -1), ("logprobs", True), ("stop_token_ids", (1, -1)), ("stop_token_ids", ("a",)),
        ("stop_token_ids", 5), ("stop_token_ids", "12"), ("stop_token_ids", range(1025)), ("ignore_eos", 1),
        ("logprobs", 1025), ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs", 1.0),
        ("min_tokens", -1), ("min_tokens", None), ("min_tokens", 2.0), ("n", 0), ("n", 129), ("n", None), ("n", True),
        ("logit_bias", [1]), ("logit_bias", None), ("logit_bias", {"1": 1.0}), ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 100.5}), ("logit_bias", {1: math.nan}), ("logit_bias", {1: "2"}), ("logit_bias", {1: True}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)), ("allowed_token_ids", ()), ("allowed_token_ids", (-1,)),
        ("allowed_token_ids", (1.0,)), ("allowed_token_ids", range(1025)), ("banned_token_ids", None),
        ("banned_token_ids", {1: 2}), ("banned_token_ids", (True,)), ("banned_token_ids", range(1025)),
    ],
)  # fmt: skip
def test_impossible_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_thousands_of_digits_are_named_and_not_repeated() -> None:
    huge = 10**5000  # too long for a test's name, and for Python to write in decimal
    for changes in ({"temperature": huge}, {"top_k": huge}, {"seed": -huge}, {"n": huge}, {"logit_bias": {-huge: 1}},
                    {"logit_bias": {huge: 101}}, {"logit_bias": {1: huge}}, {"stop_token_ids": (-huge,)}):  # fmt: skip
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
    for lists in ({"banned_token_ids": (0, 1)}, {"allowed_token_ids": (2, 3)},
                  {"allowed_token_ids": (1, 2, 3), "banned_token_ids": (1,)}):  # fmt: skip
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
