"""Calls as the coder format writes them: `<function=NAME>` with a `<parameter=NAME>` for each argument."""

from __future__ import annotations

import json
import re

from qnext.text.output.events import Call
from qnext.text.output.scan import TOOL_CALL_END, open_tag, skip_space, tag_at
from qnext.text.output.values import ArgumentTypes, json_of_value

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

_NAME = re.compile(r"[^<>\n]*")

Span = tuple[int, int]  # from where to where in the whole text of the call


class XmlCallReader:
    """Reads one call behind its opening tag, `<tool_call>` or, where the model forgot that, `<function=`.

    A value may hold the text of a closing tag: it ends at the first one that a parameter or the function's end follows.
    """

    def __init__(self, types: ArgumentTypes, *, opened_by: str) -> None:
        self.is_bare = opened_by == FUNCTION
        self.is_done = False
        self.has_failed = False
        self._types = types
        self._num_read = len(opened_by)
        self._mark = self._num_read  # where the name or the value at hand begins
        self._read = self._read_name if self.is_bare else self._read_function
        self._function: Span | None = None
        self._parameter: Span | None = None
        self._value: Span = (0, 0)
        self._arguments: list[tuple[Span, Span]] = []  # names and values

    def feed(self, text: str, start: int, end: int) -> int:
        """Read text[start:end]; returns how far. What is left begins a tag, or is what cannot be."""
        while not self.is_done and not self.has_failed:
            read = self._read
            place = read(text, start, end)
            self._num_read += place - start
            if place == start and self._read == read:
                break
            start = place
        return start

    def call(self, text: str) -> Call | None:
        """The call in the whole text with its tags; None where a parameter is there twice."""
        assert self._function is not None, "a call that is done has a name"
        function = text[slice(*self._function)]
        arguments: dict[str, str] = {}
        for name_span, value_span in self._arguments:
            name = text[slice(*name_span)]
            if name in arguments:
                return None
            value = text[slice(*value_span)].removeprefix("\n").removesuffix("\n")
            arguments[name] = json_of_value(value, self._types.of(function, name))
        pairs = (f"{json.dumps(name, ensure_ascii=False)}: {value}" for name, value in arguments.items())
        return Call(function, "{" + ", ".join(pairs) + "}")

    def _read_function(self, text: str, start: int, end: int) -> int:
        place = skip_space(text, start, end)
        tag = tag_at(text, place, end, (FUNCTION,))
        self.has_failed = tag == ""
        if not tag:
            return place
        place += len(tag)
        self._mark = self._num_read + place - start
        self._read = self._read_name
        return place

    def _read_name(self, text: str, start: int, end: int) -> int:
        match = _NAME.match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        place = match.end()
        if place == end:
            return place
        name: Span = (self._mark, self._num_read + place - start)
        self.has_failed = text[place] != ">" or name[0] == name[1]
        if self.has_failed:
            return place
        if self._function is None:
            self._function = name
            self._read = self._read_member
        else:
            self._parameter = name
            self._mark = name[1] + 1
            self._read = self._read_value
        return place + 1

    def _read_value(self, text: str, start: int, end: int) -> int:
        place = text.find(PARAMETER_END, start, end)
        if place < 0:
            return open_tag(text, start, end, (PARAMETER_END,))
        self._value = (self._mark, self._num_read + place - start)
        self._read = self._read_member
        return place + len(PARAMETER_END)

    def _read_member(self, text: str, start: int, end: int) -> int:
        """What follows the name of the function or the end of a value, which is none if nothing fit follows."""
        place = skip_space(text, start, end)
        tag = tag_at(text, place, end, (PARAMETER, FUNCTION_END))
        if tag is None:
            return place
        if not tag:
            self.has_failed = self._parameter is None
            self._read = self._read_value
            return place
        if self._parameter is not None:
            self._arguments.append((self._parameter, self._value))
        place += len(tag)
        if tag == PARAMETER:
            self._mark = self._num_read + place - start
            self._read = self._read_name
        else:
            self._read = self._read_end
            self.is_done = self.is_bare
        return place

    def _read_end(self, text: str, start: int, end: int) -> int:
        place = skip_space(text, start, end)
        tag = tag_at(text, place, end, (TOOL_CALL_END,))
        self.has_failed = tag == ""
        self.is_done = bool(tag)
        return place + len(tag or "")
