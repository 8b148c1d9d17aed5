"""JSON as models write it to JSON as a tool may rely on it, piece by piece and in linear time.

Read are also: strings in single quotes, raw control characters in strings, True, False and None, tuples, and commas
behind the last entry. What has no certain meaning fails: a key twice, NaN, half a character (a lone surrogate), more
than MAX_DEPTH levels. What is written is strict, and where the input was strict, character for character the input.
"""

from __future__ import annotations

import json
import re

from qnext.text.output.scan import WHITE_SPACE, skip_space

MAX_DEPTH = 64  # of objects and lists in one another

_RUNS = {'"': re.compile(r'[^"\\\x00-\x1f]*'), "'": re.compile(r"[^\"'\\\x00-\x1f]*")}
_NUMBER_RUN = re.compile(r"[0-9+\-.eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD_RUN = re.compile(r"[A-Za-z]*")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_ESCAPES = {'"': '\\"', "\\": "\\\\", "/": "\\/", "b": "\\b", "f": "\\f", "n": "\\n", "r": "\\r", "t": "\\t", "'": "'"}
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_HEX = frozenset("0123456789abcdefABCDEF")


class _Level:
    """An object, list or tuple that is open."""

    def __init__(self, closer: str) -> None:
        self.closer = closer
        self.keys: set[str] = set()
        self.num_commas = 0


class JsonReader:
    """Reads one value; `is_done` is set behind it. A number is done when something else follows, or at `finish`.

    `reads_lines`: values may hold raw control characters; keys never do.
    """

    def __init__(self, *, max_depth: int = MAX_DEPTH, reads_lines: bool = True) -> None:
        self.is_done = False
        self.has_failed = False
        self._max_depth = max_depth
        self._reads_lines = reads_lines
        self._levels: list[_Level] = []
        self._state = self._read_value
        self._output: list[str] = []
        self._comma = ""  # a comma and the white space behind it, until an entry follows
        self._parts: list[str] = []  # of the number, word or key at hand
        self._quote = ""  # that the string at hand began with
        self._is_key = False
        self._escape = ""  # what has come of an escape
        self._high = ""  # the escape of a surrogate whose other half must follow

    def feed(self, text: str, start: int, end: int) -> int:
        """Read text[start:end]; returns where it stopped: behind the value, at what cannot be, or at `end`."""
        while start < end and not self.is_done and not self.has_failed:
            start = self._state(text, start, end)
        return start

    def finish(self) -> None:
        """Nothing follows: a number at the top ends."""
        if not self.is_done and not self._levels and self._state in (self._read_number, self._read_word):
            self._end_scalar(is_number=self._state == self._read_number)

    def take(self) -> str:
        """The strict JSON that is certain since the last time."""
        output = "".join(self._output)
        self._output.clear()
        return output

    def _fail(self, place: int) -> int:
        self.has_failed = True
        return place

    def _space(self, text: str, start: int, end: int) -> int:
        place = skip_space(text, start, end)
        if place > start:
            self._output.append(text[start:place])
        return place

    def _held_space(self, text: str, start: int, end: int) -> int:
        """White space where a comma may be one too many."""
        place = skip_space(text, start, end)
        if self._comma:
            self._comma += text[start:place]
        elif place > start:
            self._output.append(text[start:place])
        return place

    def _write_comma(self) -> None:
        if self._comma:
            self._output.append(self._comma)
            self._comma = ""

    def _read_value(self, text: str, start: int, end: int) -> int:
        start = self._held_space(text, start, end)
        if start == end:
            return start
        mark = text[start]
        if self._levels and mark == self._levels[-1].closer and mark != "}":
            return self._close(start)
        self._write_comma()
        if mark in _CLOSERS:
            if len(self._levels) == self._max_depth:
                return self._fail(start)
            self._levels.append(_Level(_CLOSERS[mark]))
            self._output.append("[" if mark == "(" else mark)
            self._state = self._read_key if mark == "{" else self._read_value
        elif mark in _RUNS:
            self._open_string(mark, is_key=False)
        elif mark == "-" or mark.isdigit():
            self._state = self._read_number
            return start
        else:
            self._state = self._read_word
            return start
        return start + 1

    def _read_key(self, text: str, start: int, end: int) -> int:
        start = self._held_space(text, start, end)
        if start == end:
            return start
        if text[start] == "}":
            return self._close(start)
        if text[start] not in _RUNS:
            return self._fail(start)
        self._write_comma()
        self._open_string(text[start], is_key=True)
        return start + 1

    def _read_colon(self, text: str, start: int, end: int) -> int:
        start = self._space(text, start, end)
        if start == end:
            return start
        if text[start] != ":":
            return self._fail(start)
        self._output.append(":")
        self._state = self._read_entry
        return start + 1

    def _read_entry(self, text: str, start: int, end: int) -> int:
        """The value of a key, which must be there."""
        start = self._space(text, start, end)
        if start < end and text[start] in "}])":
            return self._fail(start)
        if start < end:
            self._state = self._read_value
        return start

    def _read_next(self, text: str, start: int, end: int) -> int:
        """A comma or the end, behind an entry."""
        start = self._space(text, start, end)
        if start == end:
            return start
        level = self._levels[-1]
        if text[start] == level.closer:
            if level.closer == ")" and not level.num_commas:
                return self._fail(start)  # a value in brackets is no tuple
            return self._close(start)
        if text[start] != ",":
            return self._fail(start)
        self._comma = ","
        level.num_commas += 1
        self._state = self._read_key if level.closer == "}" else self._read_value
        return start + 1

    def _close(self, start: int) -> int:
        level = self._levels.pop()
        if self._comma:
            self._output.append(self._comma[1:])
            self._comma = ""
        self._output.append("]" if level.closer == ")" else level.closer)
        self._after_value()
        return start + 1

    def _after_value(self) -> None:
        self._state = self._read_next
        self.is_done = not self._levels

    def _read_number(self, text: str, start: int, end: int) -> int:
        match = _NUMBER_RUN.match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        self._parts.append(match[0])
        if match.end() < end:
            self._end_scalar(is_number=True)
        return match.end()

    def _read_word(self, text: str, start: int, end: int) -> int:
        match = _WORD_RUN.match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        self._parts.append(match[0])
        if match.end() < end:
            self._end_scalar(is_number=False)
        elif sum(map(len, self._parts)) > 5:
            self.has_failed = True
        return match.end()

    def _end_scalar(self, *, is_number: bool) -> None:
        word = "".join(self._parts)
        self._parts.clear()
        known = word if is_number and _NUMBER.fullmatch(word) else None if is_number else _WORDS.get(word)
        if known is None:
            self.has_failed = True
            return
        self._output.append(known)
        self._after_value()

    def _open_string(self, quote: str, *, is_key: bool) -> None:
        self._quote = quote
        self._is_key = is_key
        self._parts.clear()
        self._write('"')
        self._state = self._read_string

    def _write(self, text: str) -> None:
        self._output.append(text)
        if self._is_key:
            self._parts.append(text)

    def _read_string(self, text: str, start: int, end: int) -> int:
        if self._escape:
            return self._read_escape(text, start)
        match = _RUNS[self._quote].match(text, start, end)
        assert match is not None, "the expression matches nothing too"
        place = match.end()
        if self._high and (place > start or text[place] != "\\"):
            return self._fail(start)
        if place > start:
            self._write(match[0])
        if place == end:
            return place
        mark = text[place]
        if mark == "\\":
            self._escape = mark
        elif mark == self._quote:
            self._end_string()
        elif mark == '"' or (self._reads_lines and not self._is_key):
            self._write(json.dumps(mark)[1:-1])
        else:
            return self._fail(place)
        return place + 1

    def _end_string(self) -> None:
        self._write('"')
        if not self._is_key:
            self._after_value()
            return
        key = json.loads("".join(self._parts))
        self._is_key = False
        self._parts.clear()
        self.has_failed = key in self._levels[-1].keys
        self._levels[-1].keys.add(key)
        self._state = self._read_colon

    def _read_escape(self, text: str, start: int) -> int:
        """One more character of an escape."""
        mark = text[start]
        escape = self._escape + mark
        if len(escape) == 2 and mark not in "ux":
            written = _ESCAPES.get(mark)
            if written is None or self._high:
                return self._fail(start)
            self._escape = ""
            self._write(written)
            return start + 1
        # \x41 is Python's alone, and Python writes single quotes.
        if (escape[1] == "x" and self._quote == '"') or (len(escape) > 2 and mark not in _HEX):
            return self._fail(start)
        self._escape = escape
        if len(escape) == (6 if escape[1] == "u" else 4):
            self._escape = ""
            return self._write_code("\\u" + escape[2:].rjust(4, "0"), start)
        return start + 1

    def _write_code(self, escape: str, start: int) -> int:
        code = int(escape[2:], 16)
        is_low = 0xDC00 <= code < 0xE000
        if is_low != bool(self._high):
            return self._fail(start)
        if 0xD800 <= code < 0xDC00:
            self._high = escape
        else:
            self._write(self._high + escape)
            self._high = ""
        return start + 1


def strict_json(text: str, opening: str = "") -> str | None:
    """Strict JSON of a text that is one value; None where it is not, or begins with none of `opening`."""
    word = text.strip(WHITE_SPACE)
    if not word or (opening and word[0] not in opening):
        return None
    reader = JsonReader()
    place = reader.feed(word, 0, len(word))
    reader.finish()
    return reader.take() if reader.is_done and place == len(word) else None


_TOKEN = re.compile(r'[ \t\r\n]*("(?:[^"\\]|\\.)*"|[{}\[\],:]|[^"{}\[\],: \t\r\n]+(?=[ \t\r\n,}\]]))')


def whole_members(beginning: str) -> str:
    """Strict JSON of what is whole in the beginning of strict JSON of an object.

    >>> whole_members('{"a": 1, "b": [2, 3, "fou')
    '{"a": 1, "b": [2, 3]}'
    """
    closers: list[str] = []
    kept, closing = 0, "{}"  # where the last whole value ends, and what closes the text there
    place, expects_key = 0, False
    while match := _TOKEN.match(beginning, place):
        token, place = match[1], match.end()
        is_closer = token == (closers[-1] if closers else "")
        if token in ("{", "["):
            closers.append(_CLOSERS[token])
        elif is_closer:
            closers.pop()
        if token not in (",", ":") and (is_closer or not expects_key):
            kept, closing = place, "".join(reversed(closers))
        expects_key = token == "{" or (token == "," and closers[-1:] == ["}"])
    return beginning[:kept] + closing
