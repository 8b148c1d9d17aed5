"""Who is asked, what a task in words is before it has a length, and what it is as a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from qnext.errors import UsageError

Encode = Callable[[str], list[int]]
MAX_FACTS = 1000  # names are made for
_THOUGHT_END = "</think>"


class Examinee(Protocol):
    """A model that is asked: in this process, or a server."""

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """One message of a user, up to where the answer begins. Raises UsageError without a chat format."""

    def complete(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[str]:
        """The greedy answers."""

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Of each second part behind its first one, in nats."""


class ChatFrame(NamedTuple):
    """The tokens of a chat format before and behind a message of a user."""

    head: list[int]
    tail: list[int]

    @classmethod
    def of(cls, encode_chat: Encode) -> ChatFrame:
        """What messages with nothing in common have in common."""
        first, *others = (encode_chat(text) for text in ("alpha 1", "Zeta two?", "9 (nine)"))
        head = min(_common(first, other) for other in others)
        tail = min(_common(first[::-1], other[::-1]) for other in others)
        return cls(first[:head], first[len(first) - tail :])


NO_FRAME = ChatFrame([], [])


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    same = [a == b for a, b in zip(left, right, strict=False)]
    return same.index(False) if False in same else len(same)


@dataclass(frozen=True)
class TaskShape:
    """How large a problem is: tokens in all, the answer included; facts, questions, and where the fact stands that is
    asked for first, from 0 (at the beginning) to 1. None: drawn."""

    length: int
    num_facts: int = 4
    num_queries: int = 2
    depth: float | None = None

    def __post_init__(self) -> None:
        if min(self.length, self.num_facts, self.num_queries) < 1:
            raise UsageError("length, facts and queries must be at least 1")
        if self.num_facts > MAX_FACTS:
            raise UsageError(f"at most {MAX_FACTS} facts, not {self.num_facts}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UsageError(f"depth {self.depth}: must be from 0 to 1")


class Expected(NamedTuple):
    """The answers of a problem: `pattern` finds things of their kind in a text, and the first ones must be these."""

    answers: tuple[str, ...]
    pattern: str
    is_ordered: bool = True
    alternatives: tuple[str, ...] = ()  # wrong ones, of the same form as all answers together
    joint: str = ", "

    @property
    def text(self) -> str:
        return self.joint.join(self.answers)

    def found_in(self, text: str) -> tuple[str, ...]:
        found = re.findall(self.pattern, text.rpartition(_THOUGHT_END)[2])
        return tuple(found[: len(self.answers)])

    def is_answered_by(self, text: str) -> bool:
        found = self.found_in(text)
        return found == self.answers if self.is_ordered else sorted(found) == sorted(self.answers)


class TaskText(NamedTuple):
    """A task in words before it has a length. `facts` go into filler, each a sentence; the first is asked for first."""

    intro: str
    facts: tuple[str, ...]
    question: str  # in full, for a chat
    begun: str  # the beginning of the answer, for a completion
    expected: Expected
    keeps_order: bool = False  # the facts stand in their order
    has_filler: bool = True


@dataclass(frozen=True)
class WordProblem:
    """A prompt of token ids with its expected answer, for which `max_tokens` are left of the length."""

    kind: str
    shape: TaskShape
    prompt_ids: list[int]
    max_tokens: int
    expected: Expected
