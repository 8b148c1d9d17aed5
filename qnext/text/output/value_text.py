"""The text of one argument while it comes."""

from __future__ import annotations

import json
import re

from qnext.text.output.scan import WHITE_SPACE
from qnext.text.output.values import STRING, Types, json_of_value

_TAG_LINE = re.compile(r"\n([ \t]*)\Z")  # what stands before a closing tag in a line of its own


class ValueText:
    """Text between an argument's tags to JSON. One newline at either side belongs to the tags, and so does the white
    space before a closing tag in a line of its own.

    The text of a string is certain as it comes, but for white space at its end; any other value is held until it is
    whole, and so is that of a tag behind an `indent`, which its lines may share.
    """

    def __init__(self, types: Types, *, indent: str = "") -> None:
        self.is_compact = False  # it began on the line of its tag
        self.is_blank = True
        self.whole = ""  # JSON, once it has ended
        self._is_string = types == STRING
        self._types = types
        self._indent = indent
        self._start = ""  # the beginning, while it may be a newline of two characters
        self._has_begun = False
        self._newline = "\n"
        self._pieces: list[str] = []
        self._held: list[str] = []  # of them, not sent
        self._num_sent = 0  # characters
        self._mark = '"'  # before the first text that is sent

    def restart(self) -> None:
        """Forget the white space that has come."""
        self._pieces.clear()
        self._held.clear()
        self._start = ""
        self._has_begun = False

    def add(self, text: str) -> None:
        if not self._has_begun:
            self._start += text
            if self._start in ("", "\r"):
                return
            text = self._start
            self._start = ""
            self._has_begun = True
            self.is_compact = text[0] not in "\r\n"
            self._newline = "\r\n" if text.startswith("\r\n") else "\n"
            text = text.removeprefix(self._newline)
        if text:
            self._pieces.append(text)
            self._held.append(text)
            self.is_blank = self.is_blank and not text.strip()

    def take(self) -> str:
        """The JSON that is certain since the last time."""
        if not self._is_string or not self._held or (self._indent and not self.is_compact):
            return ""
        if not self._held[-1].rstrip(WHITE_SPACE):
            return ""
        text = "".join(self._held)
        certain = text.rstrip(WHITE_SPACE)
        self._held = [text[len(certain) :]]
        return self._sent(certain)

    def _sent(self, text: str) -> str:
        mark, self._mark = self._mark, ""
        self._num_sent += len(text)
        return mark + json.dumps(text, ensure_ascii=False)[1:-1]

    def end(self, *, is_closed: bool) -> str | None:
        """The rest of the JSON; None where it is not certain.

        That is so without a closing tag, where newlines at the end may belong to the value, and for a broken list or
        object.
        """
        text = "".join(self._pieces) + self._start
        line = _TAG_LINE.search(text)
        value = text if line is None else text[: line.start()].removesuffix(self._newline[:-1])
        if line is not None and self._indent and line[1] == self._indent and not self.is_compact:
            value = _dedented(value, self._indent)
        if not is_closed:
            solid = value.rstrip("\n")
            if self.is_blank or (solid != value and "\n" in solid and self._is_string):
                return None
            value = solid
        whole = json_of_value(value, self._types)
        if whole is None:
            return None
        self.whole = whole
        return self._sent(value[self._num_sent :]) + '"' if self._is_string else whole


def _dedented(text: str, indent: str) -> str:
    """The text without the indent that all its lines share, if they do."""
    lines = text.split("\n")
    if any(line.strip() and not line.startswith(indent) for line in lines):
        return text
    return "\n".join(line.removeprefix(indent) for line in lines)
