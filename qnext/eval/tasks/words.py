"""Words and sentences that tasks are made of, drawn by a seed: plain English without facts, numbers or names."""

from __future__ import annotations

import random
from collections.abc import Iterator


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(" / ", "|").split("|")) if "/" in text else tuple(text.split())


_PEOPLE = _words("baker farmer painter sailor teacher gardener printer tailor weaver pilot miller potter fisher clerk")
_VERBS = _words("watched carried mended cleaned found painted moved opened closed counted folded left lifted kept")
_THINGS = _words("basket ladder lantern blanket bucket wagon letter bottle carpet drawer mirror saddle barrel curtain")
_KINDS = _words("old heavy small green broken quiet narrow painted wooden bright empty round plain dusty")
_PLACES = _words("by the river / near the mill / behind the barn / under the bridge / in the market / on the hill")
_TIMES = _words("in the morning / before noon / after the rain / late in the day / when the bell rang / all week")
_TAILS = _words("and went home / and said nothing / while the others rested / because nobody else would")

_HEADS = _words("amber bronze cedar coral copper crimson ebony golden indigo ivory jade lemon marble olive pearl ruby")
_SUBJECTS = _words("anchor beacon castle comet dragon falcon garden harbor island lagoon meadow orchard palace temple")


def sentences(source: random.Random) -> Iterator[str]:
    """Sentences without end, each with a space behind it."""
    while True:
        person, verb, kind, thing = (source.choice(words) for words in (_PEOPLE, _VERBS, _KINDS, _THINGS))
        place, time, tail = (source.choice(words) for words in (_PLACES, _TIMES, _TAILS))
        form = source.randrange(3)
        if form == 0:
            yield f"The {person} {verb} the {kind} {thing} {place} {tail}. "
        elif form == 1:
            yield f"{time.capitalize()} the {person} {verb} the {kind} {thing} {place}. "
        else:
            yield f"Nobody saw how the {person} {verb} the {thing} {place} {time}. "


def names(source: random.Random, count: int) -> list[str]:
    """Different names of two or three words, such as "the copper falcon"."""
    found: list[str] = []
    while len(found) < count:
        parts = [source.choice(_HEADS), source.choice(_SUBJECTS)]
        if count > 20:
            parts.insert(0, source.choice(_KINDS))
        name = f"the {' '.join(parts)}"
        if name not in found:
            found.append(name)
    return found


def numbers(source: random.Random, count: int, *, digits: int = 7) -> list[str]:
    """Different numbers."""
    return [str(number) for number in source.sample(range(10 ** (digits - 1), 10**digits), count)]


def plain_words(source: random.Random, count: int) -> list[str]:
    return [source.choice(source.choice((_PEOPLE, _THINGS, _SUBJECTS))) for _ in range(count)]


def codes(source: random.Random, count: int) -> list[str]:
    """Different names of variables, five capital letters."""
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(source.choices("BCDFGHJKLMNPQRSTVWXZ", k=5)))
    return sorted(found, key=lambda _: source.random())
