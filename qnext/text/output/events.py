"""The events of an answer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text of a thought."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins. It is certain that it is a call, whatever follows."""

    name: str


class CallArguments(NamedTuple):
    """The next piece of a call's arguments. All pieces of a complete call together are the strict JSON of an object."""

    text: str


class CallEnd(NamedTuple):
    """The call is complete."""


class CallCut(NamedTuple):
    """The call broke off, or continued as no call can: its arguments stay a beginning. `text`: what the model wrote."""

    text: str


class Call(NamedTuple):
    """A complete, valid tool call. `arguments` is the JSON text of an object."""

    name: str
    arguments: str


class CutCall(NamedTuple):
    """A call that broke off. `text` is what the model wrote, `arguments` the beginning of a JSON text."""

    text: str
    name: str
    arguments: str


OutputEvent = Content | Reasoning | CallStart | CallArguments | CallEnd | CallCut
AnswerPart = Content | Reasoning | Call | CutCall

_TEXTS = (Content, Reasoning, CallArguments)


def merged(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """The events, with neighbouring texts of one kind joined.

    >>> merged([Content("a"), Content("b"), CallStart("f")])
    [Content(text='ab'), CallStart(name='f')]
    """
    found: list[OutputEvent] = []
    for kind, group in groupby(events, key=type):
        if kind in _TEXTS:
            found.append(kind("".join(event.text for event in group if isinstance(event, _TEXTS))))
        else:
            found.extend(group)
    return found


def joined(events: Iterable[OutputEvent]) -> list[AnswerPart]:
    """What a whole answer is made of: texts of a kind that stand together are one, and so is each call.

    >>> joined([Content("a"), Content("b"), CallStart("f"), CallArguments("{}"), CallEnd()])
    [Content(text='ab'), Call(name='f', arguments='{}')]
    """
    found: list[AnswerPart] = []
    name = arguments = ""
    for event in merged(events):
        match event:
            case CallStart():
                name, arguments = event.name, ""
            case CallArguments():
                arguments += event.text
            case CallEnd():
                found.append(Call(name, arguments))
            case CallCut():
                found.append(CutCall(event.text, name, arguments))
            case _:
                found.append(event)
    return found
