"""Tasks that are as long as what they ask about: a list of pairs, a copy, a state that every step changes, a sum.

Each is drawn for a number of items; the suite finds the number that fits a length. Fewer items are a beginning of more.
"""

from __future__ import annotations

import random
from itertools import permutations

from qnext.eval.tasks import words
from qnext.eval.tasks.problem import Expected, TaskShape, TaskText
from qnext.eval.tasks.recall import NUM_ALTERNATIVES

_BOXES = "ABCDE"


def pairs(source: random.Random, shape: TaskShape, size: int) -> TaskText:
    """A list of words with numbers, and the number of one of them: recall by association, with nothing else around."""
    keys, values = words.codes(source, size), words.numbers(source, size, digits=4)
    place = source.randrange(size) if shape.depth is None else round(shape.depth * (size - 1))
    lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    decoys = [value for value in values if value != values[place]][:NUM_ALTERNATIVES]
    expected = Expected((values[place],), r"\d+", True, tuple(decoys))
    question = f"Which number stands at {keys[place]} in the list above? Answer with the number alone."
    return _whole(f"A list of codes:\n{lines}", question, f"{keys[place]}:", expected)


def copy(source: random.Random, shape: TaskShape, size: int) -> TaskText:
    """Words, and the same words again."""
    listed = words.plain_words(source, size)
    changed = list(listed)
    others = []
    for _ in range(min(NUM_ALTERNATIVES, size)):
        changed[source.randrange(size)] = "nothing"
        others.append(" ".join(changed))
    expected = Expected(tuple(listed), r"[a-z]+", True, tuple(others), " ")
    question = "Repeat the words above in the same order, and nothing else."
    return _whole(f"Words: {' '.join(listed)}\n", question, "The same words again:", expected)


def parity(source: random.Random, shape: TaskShape, size: int) -> TaskText:
    """A switch that is flipped or not: on or off in the end."""
    steps = [source.randrange(2) for _ in range(size)]
    answer, other = ("on", "off") if sum(steps) % 2 else ("off", "on")
    listed = " ".join(("wait", "flip")[step] for step in steps)
    question = "The switch was off at first. Is it on or off in the end? Answer with on or off alone."
    expected = Expected((answer,), r"\b(?:on|off)\b", True, (other,))
    return _whole(f"A switch is off. What is done to it: {listed}.\n", question, "In the end it is", expected)


def boxes3(source: random.Random, shape: TaskShape, size: int) -> TaskText:
    """Swaps of two of three boxes, which give every permutation of three things."""
    return _boxes(source, size, 3)


def boxes5(source: random.Random, shape: TaskShape, size: int) -> TaskText:
    """The same with five."""
    return _boxes(source, size, 5)


def addition(source: random.Random, shape: TaskShape, size: int) -> TaskText:
    """Two numbers of `size` digits."""
    left, right = (source.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    total = left + right
    others = tuple(_decimal(total + 10 ** source.randrange(size)) for _ in range(NUM_ALTERNATIVES))
    question = f"What is {_decimal(left)} + {_decimal(right)}? Answer with the number alone."
    expected = Expected((_decimal(total),), r"\d+", True, others)
    return _whole("", question, f"{_decimal(left)} + {_decimal(right)} =", expected)


def _decimal(number: int) -> str:
    """Python refuses to write numbers of more than some thousand digits in one go."""
    parts = []
    while number >= 10**1000:
        number, low = divmod(number, 10**1000)
        parts.append(f"{low:01000d}")
    return "".join([str(number), *reversed(parts)])


def _boxes(source: random.Random, size: int, count: int) -> TaskText:
    held = list(_BOXES[:count])
    swaps = []
    for _ in range(size):
        one, two = source.sample(range(count), 2)
        held[one], held[two] = held[two], held[one]
        swaps.append(f"{one + 1}-{two + 1}")
    intro = (
        f"{count} boxes stand in a row. Box 1 to box {count} hold {' '.join(_BOXES[:count])}. "
        f"Then the contents of two boxes are swapped, again and again: {' '.join(swaps)}.\n"
    )
    wrong = [each for each in permutations(_BOXES[:count]) if list(each) != held]
    others = tuple(" ".join(each) for each in source.sample(wrong, min(NUM_ALTERNATIVES, len(wrong))))
    question = f"What do box 1 to box {count} hold in the end? Answer with the {count} letters alone."
    expected = Expected(tuple(held), rf"\b[{_BOXES[:count]}]\b", True, others, " ")
    return _whole(intro, question, f"In the end box 1 to box {count} hold", expected)


def _whole(intro: str, question: str, begun: str, expected: Expected) -> TaskText:
    return TaskText(intro, (), question, begun, expected, has_filler=False)
