"""Calls as the instruct and thinking formats write them: a JSON object between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from qnext.text.output.events import CallArguments, CallEnd, CallStart, OutputEvent
from qnext.text.output.json_values import MAX_DEPTH, JsonReader, strict_json
from qnext.text.output.scan import CALL_KINDS, skip_space, tag_at
from qnext.text.output.values import ToolTable

_ARGUMENTS = ("arguments", "parameters")
_NEUTRAL = ("id", "type", "index", "call_id")  # say nothing about what is called
_FENCE = re.compile(r"[`a-z]*")


class JsonCallReader:
    """Reads the calls behind one opening tag: one object, several, or a list of them.

    Their form is certain when the name has come and the arguments begin; what follows a whole object takes nothing
    away from it. A bracket that misses behind the arguments is made up for, inside the arguments nothing is. A key
    that has no place in a call fails: the arguments may have been closed too early.
    """

    def __init__(self, tools: ToolTable) -> None:
        self.is_done = False
        self.has_failed = False
        self.has_started = False  # a call that has not ended
        self.events: list[OutputEvent] = []
        self.leftover = ""
        self._tools = tools
        self._state = self._read_opening
        self._is_list = False
        self._value = JsonReader()
        self._take_value: Callable[[], None] = self._take_key
        self._new_call()

    def _new_call(self) -> None:
        self._depth = 0  # of objects that are open: a function object may stand in the call
        self._keys: set[str] = set()
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None

    def feed(self, text: str, start: int, end: int) -> int:
        """Read text[start:end]; returns how far, and behind each call. What is left begins a tag, or is what cannot
        be."""
        while not self.is_done and not self.has_failed:
            state, num_events = self._state, len(self.events)
            place = state(text, start, end)
            if place == start and state == self._state:
                break
            start = place
            if any(isinstance(event, CallEnd) for event in self.events[num_events:]):
                break
        return start

    def finish(self, *, has_ended: bool) -> None:
        """The answer is over: only brackets may be missing."""
        if self._state == self._read_next and self._arguments is not None:
            self._end_call()
        self.is_done = self._state in (self._read_tail, self._read_next_call)
        self.has_failed = not self.is_done

    def _read_opening(self, text: str, start: int, end: int) -> int:
        start = skip_space(text, start, end)
        if start == end:
            return start
        if text[start] == "`" and not self._is_list:
            self._state = self._read_fence
            return start
        if text[start] == "[" and not self._is_list:
            self._is_list = True
            return start + 1
        self.has_failed = text[start] != "{"
        if not self.has_failed:
            self._new_call()
            self._depth = 1
            self._state = self._read_key
            start += 1
        return start

    def _read_fence(self, text: str, start: int, end: int) -> int:
        match = _FENCE.match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        if match.end() < end:
            self._state = self._read_opening
        return match.end()

    def _read_key(self, text: str, start: int, end: int) -> int:
        start = skip_space(text, start, end)
        if start == end:
            return start
        if text[start] == "}":
            return self._close(start)
        self.has_failed = text[start] not in "\"'"
        if not self.has_failed:
            self._open_value(self._take_key)
        return start

    def _open_value(self, take: Callable[[], None]) -> None:
        self._value = JsonReader(max_depth=MAX_DEPTH - 1, reads_lines=take in (self._take_object, self._take_text))
        self._take_value = take
        self._state = self._read_value

    def _read_value(self, text: str, start: int, end: int) -> int:
        start = self._value.feed(text, start, end)
        self.has_failed = self._value.has_failed
        if self.has_started and self._take_value == self._take_object:
            # The last bracket waits for the call's end: cut arguments are no JSON.
            self._write(self._value.take().removesuffix("}" if self._value.is_done else ""))
        if self._value.is_done:
            self._take_value()
        return start

    def _take_key(self) -> None:
        self._key = json.loads(self._value.take())
        twin = {"arguments": "parameters", "parameters": "arguments", "name": "function"}.get(self._key, self._key)
        is_known = self._key in (*_ARGUMENTS, *_NEUTRAL, "name", "function")
        self.has_failed = not is_known or self._key in self._keys or (twin in self._keys and twin in _ARGUMENTS)
        self._keys.add(self._key)
        self._state = self._read_colon

    def _read_colon(self, text: str, start: int, end: int) -> int:
        start = skip_space(text, start, end)
        if start < end:
            self.has_failed = text[start] != ":"
            self._state = self._read_member
            start += not self.has_failed
        return start

    def _read_member(self, text: str, start: int, end: int) -> int:
        """The beginning of a value."""
        start = skip_space(text, start, end)
        if start == end:
            return start
        is_object = text[start] == "{"
        if self._key == "function" and is_object:
            self._depth += 1
            self._state = self._read_key
            return start + 1
        if self._key in ("name", "function"):
            self._open_value(self._take_name)
        elif self._key in _NEUTRAL:
            self._open_value(self._take_neutral)
        elif is_object:
            if self._name is not None:
                self._start(self._name)
            self._open_value(self._take_object)
        else:
            self._open_value(self._take_text)
        return start

    def _take_name(self) -> None:
        name = json.loads(self._value.take())
        self.has_failed = not isinstance(name, str) or not name or self._name is not None
        self._name = name
        self._state = self._read_next

    def _take_neutral(self) -> None:
        self._value.take()
        self._state = self._read_next

    def _take_object(self) -> None:
        self._arguments = self._value.take()
        self._state = self._read_next

    def _take_text(self) -> None:
        """Some models write the object as a text that holds it; none at all, or null, is an object without members."""
        value = json.loads(self._value.take(), parse_int=lambda _: 0)
        if isinstance(value, str) and value:
            self._arguments = strict_json(value, "{")
            self.has_failed = self._arguments is None
        else:
            self.has_failed = value is not None and value != ""
        self._state = self._read_next

    def _read_next(self, text: str, start: int, end: int) -> int:
        """A comma or the end, behind a member."""
        start = skip_space(text, start, end)
        if start == end:
            return start
        if text[start] == ",":
            self._state = self._read_key
            return start + 1
        if text[start] == "}":
            return self._close(start)
        tag = tag_at(text, start, end, CALL_KINDS) if text[start] == "<" and self._arguments is not None else False
        if tag is None:
            return start
        if tag and (tag.closes or tag.opens_call):
            self._end_call()
        else:
            self.has_failed = True
        return start

    def _close(self, start: int) -> int:
        self._depth -= 1
        if self._depth:
            self._state = self._read_next
        else:
            self._end_call()
        return start + 1

    def _end_call(self) -> None:
        name, arguments = self._name, self._arguments
        if name is not None and arguments is None and not self._tools.required(name):
            arguments = "{}"
        if name is None or arguments is None:
            self.has_failed = True
            return
        if not self.has_started:
            self._start(name)
            self._write(arguments)
        else:
            self._write("}")
        self.events.append(CallEnd())
        self.has_started = False
        self._state = self._read_next_call if self._is_list else self._read_tail

    def _start(self, name: str) -> None:
        self.has_started = True
        self.events.append(CallStart(name))

    def _write(self, text: str) -> None:
        if text:
            self.events.append(CallArguments(text))

    def _read_next_call(self, text: str, start: int, end: int) -> int:
        start = skip_space(text, start, end)
        if start < end and text[start] == ",":
            self._state = self._read_opening
            return start + 1
        if start < end:
            self._state = self._read_tail
            start += text[start] == "]"
        return start

    def _read_tail(self, text: str, start: int, end: int) -> int:
        """The closing tag; or the next call, another tag, or text, before which the call was closed too late."""
        start = skip_space(text, start, end)
        if start == end:
            return start
        mark = text[start]
        if mark in "}`,":
            return start + 1
        if mark == "{" and not self._is_list:
            self._state = self._read_opening
            return start
        tag = tag_at(text, start, end, CALL_KINDS) if mark == "<" else False
        if tag is None:
            return start
        self.is_done = True
        return start + tag.length if tag and tag.closes else start
