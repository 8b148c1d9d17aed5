"""One tool call in whichever form a model writes it, and calls inside a thought."""

from __future__ import annotations

from typing import Protocol

from qnext.text.output.events import CallEnd, OutputEvent
from qnext.text.output.json_calls import JsonCallReader
from qnext.text.output.scan import CALL_KINDS, KINDS, Tag, skip_space, tag_at
from qnext.text.output.values import ToolTable
from qnext.text.output.xml_calls import XmlCallReader

MAX_CALL_LENGTH = 1 << 20  # characters; a longer call is cut


class _CallSyntax(Protocol):
    """Reads what stands behind a call's opening tag, in pieces.

    `has_started`: a call has begun and not ended; with `has_failed` it is cut. `leftover` is text that was read and
    stands behind the call, where it ended or failed.
    """

    is_done: bool
    has_failed: bool
    has_started: bool
    events: list[OutputEvent]
    leftover: str

    def feed(self, text: str, start: int, end: int) -> int: ...

    def finish(self, *, has_ended: bool) -> None: ...


class CallReader:
    """Reads what one opening tag begins: `<tool_call>`, or a `<function=NAME>` without it."""

    def __init__(self, tools: ToolTable, opening: str, tag: Tag) -> None:
        self._tools = tools
        self._form: _CallSyntax | None = None
        self._has_failed = False
        self._held = [opening]  # what was read since the tag, or since the last whole call
        self._num_held = len(opening)
        if tag.kind == "function":
            self._form = XmlCallReader(tools, is_bare=True)
            self._form.feed(opening, 0, len(opening))

    @property
    def is_done(self) -> bool:
        return self._form is not None and self._form.is_done

    @property
    def has_failed(self) -> bool:
        return self._has_failed or (self._form is not None and self._form.has_failed)

    @property
    def has_started(self) -> bool:
        return self._form is not None and self._form.has_started

    @property
    def leftover(self) -> str:
        """Text behind the call that was read already."""
        return self._form.leftover if self._form is not None else ""

    @property
    def held(self) -> str:
        """The text of the call so far, without what is left over."""
        held = "".join(self._held)
        return held[: len(held) - len(self.leftover)]

    def feed(self, text: str, start: int) -> int:
        """Read on from `start`; returns how far: what is left may begin a tag."""
        end = min(len(text), start + MAX_CALL_LENGTH - self._num_held)
        place = self._open(text, start, end) if self._form is None else start
        if self._form is not None and not self.has_failed:
            place = self._form.feed(text, place, end)
        self._held.append(text[start:place])
        self._num_held += place - start
        is_whole = self._form is not None and self._form.events[-1:] == [CallEnd()]
        if self._num_held + end - place >= MAX_CALL_LENGTH and not is_whole and not self.is_done:
            self._has_failed = True
        return place

    def take(self) -> list[OutputEvent]:
        """The events since the last time."""
        if self._form is None or not self._form.events:
            return []
        events, self._form.events = self._form.events, []
        if not self.has_started:
            self._held, self._num_held = [], 0
        return events

    def finish(self, *, has_ended: bool) -> None:
        if self._form is not None:
            self._form.finish(has_ended=has_ended)
        self._has_failed = self._has_failed or not self.is_done

    def _open(self, text: str, start: int, end: int) -> int:
        """Find the form of the call."""
        while self._form is None and not self._has_failed:
            start = skip_space(text, start, end)
            if start == end:
                break
            tag = tag_at(text, start, end, CALL_KINDS) if text[start] == "<" else False
            if tag is None:
                break
            if tag and tag.opens_call and tag.kind == "tool_call":
                start += tag.length  # an opening tag too many
            elif tag and tag.opens_call:
                self._form = XmlCallReader(self._tools, is_bare=False)
            elif text[start] in "{[`":
                self._form = JsonCallReader(self._tools)
            else:
                self._has_failed = True
        return start


class ThoughtCalls:
    """Reads calls inside a thought, which count if nothing follows them but the end of the thought and of the answer.

    Until that is known nothing comes out.
    """

    def __init__(self, tools: ToolTable, opening: str, tag: Tag) -> None:
        self.has_failed = False
        self.opening = opening
        self._tools = tools
        self._call: CallReader | None = CallReader(tools, opening, tag)
        self._events: list[OutputEvent] = []
        self._held: list[str] = []  # what was read behind the opening
        self._is_closed = False  # the thought

    @property
    def held(self) -> str:
        return "".join(self._held)

    def feed(self, text: str, start: int) -> int:
        place = start
        while place < len(text) and not self.has_failed:
            before = place
            place = self._read_call(self._call, text, place) if self._call else self._read_between(text, place)
            if place == before and (self._call is None or not self._call.is_done):
                break
        self._held.append(text[start:place])
        return place

    def finish(self, rest: str, *, has_ended: bool) -> list[OutputEvent]:
        """The calls, or none where the text is a thought. `rest`: the beginning of a tag."""
        if self._call is not None:
            self._call.finish(has_ended=has_ended)
            self._events += self._call.take()
            self.has_failed = self._call.has_failed or self._call.leftover.strip() != ""
        self.has_failed = self.has_failed or (self._call is None and rest != "")
        return [] if self.has_failed else self._events

    def _read_call(self, call: CallReader, text: str, start: int) -> int:
        place = call.feed(text, start)
        while (events := call.take())[-1:] == [CallEnd()] and not call.is_done:
            self._events += events
            place = call.feed(text, place)
        self._events += events
        self.has_failed = call.has_failed or call.leftover.strip() != ""
        if call.is_done:
            self._call = None
        return place

    def _read_between(self, text: str, start: int) -> int:
        place = skip_space(text, start, len(text))
        if place == len(text):
            return place
        tag = tag_at(text, place, len(text), KINDS) if text[place] == "<" else False
        if tag is None:
            return place
        if not tag or self._is_closed or (tag.kind == "think" and not tag.closes):
            self.has_failed = True
            return place
        end = place + tag.length
        if tag.kind == "think":
            self._is_closed = True
        elif tag.opens_call and (tag.kind == "tool_call" or tag.name in self._tools):
            self._call = CallReader(self._tools, text[place:end], tag)
        else:
            self.has_failed = not tag.closes  # a closing tag too many means nothing
        return end
