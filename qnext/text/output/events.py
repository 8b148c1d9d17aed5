"""What an answer is made of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text of the thought before the answer."""

    text: str


class Call(NamedTuple):
    """A whole, valid tool call; `arguments` is the JSON text of an object."""

    name: str
    arguments: str


OutputEvent = Content | Reasoning | Call


def joined(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """The events with neighbouring texts of a kind made one; calls stay apart.

    >>> joined([Content("a"), Content("b"), Call("f", "{}")])
    [Content(text='ab'), Call(name='f', arguments='{}')]
    """
    found: list[OutputEvent] = []
    for kind, group in groupby(events, key=type):
        if kind is Call:
            found.extend(group)
        else:
            found.append(kind("".join(event[0] for event in group)))
    return found
