"""Tags and the ends of JSON values in text that arrives in pieces: no character is looked at twice."""

from __future__ import annotations

import re
from collections.abc import Collection

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
WHITE_SPACE = " \t\r\n"
MAX_DEPTH = 64  # of objects and lists in one another

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_BETWEEN = re.compile(r"[ \t\r\n,:+\-.0-9a-zA-Z]*")


def skip_space(text: str, start: int, end: int) -> int:
    """Where the white space that stands at `start` ends."""
    match = _SPACE.match(text, start, end)
    assert match is not None, "the expression matches nothing too"
    return match.end()


def tag_at(text: str, start: int, end: int, tags: Collection[str]) -> str | None:
    """Which of `tags` stands at `start`: "" for none, None while text[start:end] is too short to tell."""
    for tag in tags:
        if text.startswith(tag, start, end):
            return tag
    head = text[start : min(end, start + max(map(len, tags)))]
    return None if any(tag.startswith(head) for tag in tags) else ""


def open_tag(text: str, start: int, end: int, tags: Collection[str]) -> int:
    """Where the text ends that surely holds none of `tags`: before a tag's beginning at the very end, else `end`.

    A tag has its only `<` at its beginning.
    """
    place = text.rfind("<", max(start, end - max(map(len, tags)) + 1), end)
    return place if place >= 0 and any(tag.startswith(text[place:end]) for tag in tags) else end


class JsonScanner:
    """Finds the end of an object or list, of which the first bracket comes first.

    What it passes is not yet JSON, but has its brackets closed, its strings ended, no character that JSON does not
    know, and at most MAX_DEPTH levels, so that a recursive parser may read it.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.has_failed = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str, start: int, end: int) -> int:
        """Read text[start:end]; returns where it stopped: behind the value, at what cannot be, or at `end`."""
        while start < end and not self.is_done and not self.has_failed:
            start = (self._read_string if self._in_string else self._read_between)(text, start, end)
        return start

    def _read_string(self, text: str, start: int, end: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            self.has_failed = text[start] < " "
            return start if self.has_failed else start + 1
        match = _STRING.match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        start = match.end()
        if start == end:
            return start
        if text[start] == '"':
            self._in_string = False
        elif text[start] == "\\":
            self._is_escaped = True
        else:
            self.has_failed = True
            return start
        return start + 1

    def _read_between(self, text: str, start: int, end: int) -> int:
        match = _BETWEEN.match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        start = match.end()
        if start == end:
            return start
        mark = text[start]
        if mark == '"':
            self._in_string = True
        elif mark in "{[":
            self._depth += 1
        elif mark in "}]":
            self._depth -= 1
        if mark not in '"{}[]' or self._depth > MAX_DEPTH:
            self.has_failed = True
            return start
        self.is_done = self._depth == 0
        return start + 1
