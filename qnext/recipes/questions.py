"""Questions with known answers, made by a seeded generator: arithmetic, strings, and Python's library.

A question is held out when the hash of its contents falls below the share, whatever its wording. The facts about
modules are the exception: nobody can infer an unseen fact, so their held-out questions ask for known facts in a wording
that this fact was never asked in.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

_MODULES = ("math", "json", "random", "shutil", "heapq", "bisect", "textwrap", "itertools", "functools", "statistics")
_DRAWS = 1000  # until a kind counts as exhausted
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Question(NamedTuple):
    """`key` says what is asked, in no wording. `thought` leads to the answer step by step."""

    kind: str
    text: str
    answer: str
    thought: str
    key: str


def questions(count: int, *, seed: int, held_out: bool, share: float = 0.1) -> list[Question]:
    """`count` questions, of all kinds in turn. The two sides of `held_out` never share a key.

    On the held-out side they are different; a kind that has no other left gives way.
    """
    source = random.Random(f"{seed}/{held_out}")
    found: list[Question] = []
    seen: set[str] = set()
    kinds = list(_KINDS.values())
    while len(found) < count:
        make = kinds[len(found) % len(kinds)]
        drawn = (make(source) for _ in range(_DRAWS))
        chosen = next((each for each in drawn if _is_on_side(each, held_out, share, seen)), None)
        if chosen is None:
            kinds.remove(make)
            assert kinds, "no kind has so many questions"
            continue
        seen.add(chosen.text)
        found.append(chosen)
    return found


def _is_on_side(question: Question, held_out: bool, share: float, seen: set[str]) -> bool:
    return (_hash(question.key) < share) == held_out and not (held_out and question.text in seen)


def messages(question: Question, *, thinks: bool) -> dict[str, Any]:
    """A sample in the form `messages`."""
    answer = {"role": "assistant", "content": question.answer}
    thought = {"reasoning_content": question.thought} if thinks else {}
    return {"messages": [{"role": "user", "content": question.text}, answer | thought]}


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _addition(source: random.Random) -> Question:
    left, right = source.randrange(50), source.randrange(10)
    text = _worded(source, "What is {} + {}?", "Add {} and {}.").format(left, right)
    tens, ones = divmod(left, 10)
    total = ones + right
    thought = f"{ones} + {right} = {total}. {tens} + {total // 10} = {tens + total // 10}."
    return Question("addition", text, str(left + right), thought, f"{min(left, right)}+{max(left, right)}")


def _subtraction(source: random.Random) -> Question:
    right = source.randrange(10)
    left = source.randrange(right, 50)
    text = _worded(source, "What is {} - {}?", "Take {1} from {0}.").format(left, right)
    tens, ones = divmod(left, 10)
    borrowed = int(ones < right)
    ones += 10 * borrowed
    thought = f"{ones} - {right} = {ones - right}. {tens} - {borrowed} = {tens - borrowed}."
    return Question("subtraction", text, str(left - right), thought, f"{left}-{right}")


def _comparison(source: random.Random) -> Question:
    left, right = source.sample(range(10, 100), 2)
    text = _worded(source, "Which is larger, {} or {}?", "Give the larger of {} and {}.").format(left, right)
    place = 0 if left // 10 != right // 10 else 1
    signs = [str(left)[place], str(right)[place]]
    thought = f"{signs[0]} {'>' if signs[0] > signs[1] else '<'} {signs[1]}."
    return Question("comparison", text, str(max(left, right)), thought, f"max {min(left, right)} {max(left, right)}")


def _letters(source: random.Random) -> str:
    return " ".join(source.choice(_LETTERS) for _ in range(source.randint(2, 5)))


def _reversal(source: random.Random) -> Question:
    letters = _letters(source)
    text = _worded(source, "Reverse {}.", "Write {} backwards.").format(letters)
    parts = letters.split()
    return Question("reversal", text, letters[::-1], f"It ends with {parts[-1]}.", f"reverse {letters}")


def _count(source: random.Random) -> Question:
    letters = _letters(source)
    text = _worded(source, "How many letters are in {}?", "Count the letters: {}").format(letters)
    parts = letters.split()
    thought = ", ".join(f"{number} {letter}" for number, letter in enumerate(parts, 1)) + "."
    return Question("count", text, str(len(parts)), thought, f"count {letters}")


def _last(source: random.Random) -> Question:
    letters = _letters(source)
    text = _worded(source, "What is the last letter of {}?", "Give the last letter: {}").format(letters)
    parts = letters.split()
    return Question("last letter", text, parts[-1], f"It has {len(parts)} letters.", f"last {letters}")


def _numbers(source: random.Random) -> list[int]:
    return [source.randrange(10) for _ in range(source.randint(2, 4))]


def _call(source: random.Random) -> Question:
    """What a function of the library returns."""
    function = source.choice((max, min, len, sorted))
    numbers = _numbers(source)
    call = f"{function.__name__}({numbers})"
    value = function(numbers)
    text = _worded(source, "What does {} return?", "Evaluate {}").format(call)
    return Question("call", text, str(value), f"{function.__name__} of {len(numbers)} numbers.", call)


def _module(source: random.Random) -> Question:
    """Where a function of the library lives."""
    facts = _facts()
    name = source.choice(sorted(facts))
    wording = source.choice(("Which module has {}?", "Where is {} defined?", "What do I import for {}?"))
    answer = facts[name]
    return Question("module", wording.format(name), answer, f"{answer}.{name}", f"{name} {wording}")


@cache
def _facts() -> dict[str, str]:
    """Public functions that just one of the modules has, and that one."""
    homes: dict[str, list[str]] = {}
    for module in _MODULES:
        names = getattr(importlib.import_module(module), "__all__", None) or dir(importlib.import_module(module))
        for name in names:
            if name.islower() and not name.startswith("_") and callable(getattr(importlib.import_module(module), name)):
                homes.setdefault(name, []).append(module)
    return {name: found[0] for name, found in homes.items() if len(found) == 1}


def _worded(source: random.Random, *wordings: str) -> str:
    return source.choice(wordings)


_KINDS: dict[str, Callable[[random.Random], Question]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "comparison": _comparison,
    "reversal": _reversal,
    "count": _count,
    "last letter": _last,
    "call": _call,
    "module": _module,
}
