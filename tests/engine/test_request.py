"""Parameters and prompts are checked once, where they come in."""

from __future__ import annotations

import math
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
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5), ("seed", 1.0), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", 1.0),
        ("logprobs", -1), ("logprobs", True), ("stop_token_ids", (1, -1)), ("stop_token_ids", ("a",)),
    ],
)  # fmt: skip
def test_impossible_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63))
    SamplingParams(temperature=1e-30, top_k=10**9, top_p=1e-9, repetition_penalty=1e-3, max_tokens=1, logprobs=0)


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
    with pytest.raises(DoesNotFit, match="at most 9 tokens"):
        output_allowance(10, SamplingParams(), max_model_len=10)
