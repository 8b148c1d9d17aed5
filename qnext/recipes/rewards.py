"""Problems with known answers, and functions that reward an answer to them.

A new task with problems of its own is a line of `TASKS`, a new way to compare answers one of `REWARDS`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from qnext.errors import UsageError
from qnext.recipes.sums import Exercise, exercises
from qnext.text.messages import Message, checked_conversation, message_from_dict
from qnext.text.sample_files import read_values
from qnext.text.thinking import THINK_END

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class Query(NamedTuple):
    """What is asked, and the answer that is known of it."""

    messages: tuple[Message, ...]
    answer: str


def queries_of(path: Path) -> list[Query]:
    """The problems of a file or folder, each a JSON object with `answer` and `prompt` (a text) or `messages`.

    Raises UsageError naming file and line for what is none.
    """
    found = []
    for place, value, _ in read_values(path):
        try:
            found.append(_query(value))
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from None
    return found


def _query(value: Any) -> Query:
    if not isinstance(value, Mapping):
        raise UsageError("a problem is a JSON object")
    answer = value.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise UsageError("a problem needs an answer, a text or a number")
    asked = [key for key in ("prompt", "messages") if key in value]
    if len(asked) != 1:
        raise UsageError("a problem needs either prompt or messages")
    turns = value[asked[0]]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise UsageError(f"{asked[0]} must be a text or messages")
    messages = checked_conversation([message_from_dict(turn) for turn in turns])
    if messages[-1].role == "assistant":
        raise UsageError("the last message of a problem is not the assistant's")
    return Query(tuple(messages), str(answer).strip())


def sum_of(exercise: Exercise) -> Query:
    return Query((Message("user", exercise.question),), exercise.truth)


def _sums() -> list[Query]:
    return list(dict.fromkeys(map(sum_of, exercises(6000, seed="problems"))))


TASKS: dict[str, Callable[[], list[Query]]] = {"sums": _sums}


def is_held_out(query: Query, share: float) -> bool:
    """By the hash of what is asked, so that files can grow."""
    text = "\n".join(message.content for message in query.messages)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2.0**64


def final_answer(text: str, *, is_thinking: bool) -> str | None:
    """What stands behind the thought; None where the thought has not ended. `is_thinking`: the prompt opened one."""
    _, closed, rest = text.rpartition(THINK_END)
    return None if is_thinking and not closed else rest.strip()


def _exact(said: str, answer: str) -> float:
    return float(said == answer)


def _numeric(said: str, answer: str) -> float:
    """Whether the last number of both is the same number."""
    numbers = [_last_number(text) for text in (said, answer)]
    return float(numbers[0] is not None and numbers[0] == numbers[1])


def _last_number(text: str) -> Decimal | None:
    found: Sequence[str] = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


REWARDS: dict[str, Callable[[str, str], float]] = {"exact": _exact, "numeric": _numeric}
