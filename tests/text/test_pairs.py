"""Pairs of answers: every form of the same pair is the same pair, and what is no pair is named."""

from __future__ import annotations

from typing import Any

import pytest

from qnext.errors import UsageError
from qnext.text.pairs import pair_of

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
SYSTEM = {"role": "system", "content": "s"}
SAME: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"question": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": GOOD, "rejected": [BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "a", "rejected": "b"},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 7.5},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
]


@pytest.mark.parametrize("value", SAME)
@pytest.mark.parametrize("system", [None, "s"])
def test_forms_of_one_pair_are_one_pair(value: dict[str, Any], system: str | None) -> None:
    pair = pair_of(value if system is None else {**value, "system": system})
    first = pair_of(SAME[0] if system is None else {**SAME[0], "system": system})
    assert pair == first and pair.digest() == first.digest()
    roles = [message.role for message in pair.chosen.messages]
    assert roles == ([] if system is None else ["system"]) + ["user", "assistant"]
    assert [pair.chosen.messages[-1].content, pair.rejected.messages[-1].content] == ["a", "b"]
    assert pair.chosen.is_taught == (*[False] * (len(roles) - 1), True)
    assert pair.digest() != pair_of({**value, "system": "other"}).digest()


def test_turns_that_both_have_are_not_taught() -> None:
    shared, again = [SYSTEM, USER, GOOD, USER], [USER, GOOD]
    pair = pair_of({"chosen": [*shared, GOOD, *again], "rejected": [*shared, BAD, *again]})
    assert pair.chosen.is_taught == pair.rejected.is_taught == (False, False, False, False, True, True, True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["q"], "a pair is not a JSON object"),
        ({"prompt": "q", "completion": "a"}, "needs chosen and rejected, not only keys completion, prompt"),
        ({"chosen": "a", "rejected": "b"}, "chosen: a text needs a prompt beside it"),
        ({"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"}, "one prompt, not prompt and question"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "rejected: an answer is a text, a message or a list"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "rejected: expected a text or one message"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "chosen: prompt is not a list of messages"),
        ({"chosen": [USER, GOOD], "rejected": [BAD, USER]}, "there is no prompt"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "the prompt is no message"),
        (
            {"prompt": [{"role": "king", "content": ""}], "chosen": "a", "rejected": "b"},
            "chosen: message 0: unknown",
        ),
    ],
)
def test_what_is_no_pair_is_named(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pair_of(value)
