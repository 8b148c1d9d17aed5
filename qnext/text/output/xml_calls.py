"""Calls as the coder format writes them: `<function=NAME>` with a `<parameter=NAME>` for each argument.

A value may hold the text of tags. It ends at `</parameter>` with another tag of the call behind it. Where that is
missing it ends before another parameter that the tool has, and before `</function>` or `</tool_call>` with nothing of
the value behind it, if they stand on lines of their own. A call inside a value belongs to the value if the value is
closed behind it. What could be read in two ways is no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qnext.text.output.events import CallArguments, CallEnd, CallStart, OutputEvent
from qnext.text.output.json_values import JsonReader
from qnext.text.output.scan import CALL_KINDS, WHITE_SPACE, Tag, skip_space, tag_at
from qnext.text.output.value_text import ValueText
from qnext.text.output.values import ToolTable

_SIGNS = {"tool_call": "T", "function": "F", "parameter": "P", "think": "x"}

# What tags inside a value mean, by their signs: a capital opens, a small letter closes, "x" is text, "$" the end of the
# answer. The first rule that fits the whole row counts.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(signs), meaning)
    for signs, meaning in (
        ("TF|F[Pf]", "nested"),
        ("T[^F]|F[^Pf]", "text"),
        ("p[PftTF]", "closed"),
        (r"p\$", "closed at the end"),
        ("pp|ff|tt|ft[ft]", "again"),
        ("[pft]x|[ft]px|ft[px]|[ft]p[fP]", "text"),
        ("ft|fp|tp", "open"),
        (r"(ft|f|t)[TF$]|fp[t$]", "not closed"),
    )
)


class Markup(NamedTuple):
    """A tag, or text without one."""

    text: str
    tag: Tag | None = None

    @property
    def sign(self) -> str:
        """ "x" for text, " " for white space, else a letter of the tag."""
        if self.tag is None:
            return "x" if self.text.strip(WHITE_SPACE) else " "
        letter = _SIGNS[self.tag.kind]
        return letter.lower() if self.tag.closes else letter


class XmlCallReader:
    """Reads one call: behind `<tool_call>`, or, where the model forgot that, from `<function=` on.

    The call is certain when its function has a name and a parameter, a JSON object or the end follows.
    """

    def __init__(self, tools: ToolTable, *, is_bare: bool) -> None:
        self.is_done = False
        self.has_failed = False
        self.has_started = False
        self.events: list[OutputEvent] = []
        self.leftover = ""  # was read, but stands behind the call
        self._tools = tools
        self._is_bare = is_bare
        self._take: Callable[[Markup], None] = self._take_function
        self._object: JsonReader | None = None  # that reads arguments written as JSON
        self._has_object = False
        self._function = ""
        self._written: dict[str, str] = {}  # JSON of the arguments by name
        self._gap = ""  # white space since the last tag, between parameters
        self._parameter = ""
        self._value = ValueText(frozenset())
        self._is_again = False  # the parameter has a value already
        self._is_line_blank = True  # so far, of the value's last line
        self._tail = ""  # of the value
        self._has_opening = False  # it holds what looks like an opening tag
        self._pending: list[Markup] = []  # a tag in a value that may end it, and what followed
        self._signs = ""  # of the pending tags
        self._is_pending_apart = False  # it stands on a line of its own
        self._nested: list[str] | None = None  # the value's text from the first call in it on
        self._nested_sign = ""
        self._nested_depth = 0

    def feed(self, text: str, start: int, end: int) -> int:
        """Read text[start:end]; returns how far. What is left begins a tag."""
        while start < end and not self.is_done and not self.has_failed:
            if self._object is not None:
                start = self._read_object(self._object, text, start, end)
                continue
            tag: Tag | None = None
            place = skip_space(text, start, end)
            if text[start] == "<":
                found = tag_at(text, start, end, CALL_KINDS)
                if found is None:
                    break
                tag = found or None
                place = start + (tag.length if tag else 1)
            elif place == start and self._take == self._take_value and not self._pending:
                place = text.find("<", start, end)
                place = end if place < 0 else place
            elif place == start:
                place += 1  # this character decides, however much of the text is there
            if self._take == self._take_member and text[start] == "{" and not self._written:
                self._start()
                self._object = JsonReader()
                self._has_object = True
                continue
            self._take(Markup(text[start:place], tag))
            start = place
        return start

    def finish(self, *, has_ended: bool) -> None:
        """The answer is over. `has_ended`: the model ended it, nothing cut it."""
        if self._take == self._take_value:
            self._finish_value(has_ended=has_ended)
        elif self._take == self._take_member and self._written:
            self._end_call(is_certain=has_ended and self._has_required)
        elif self._take in (self._take_end, self._take_behind):
            self._end_call(leftover=self._pending)
        self.has_failed = not self.is_done

    def _finish_value(self, *, has_ended: bool) -> None:
        meaning = self._meaning("$")
        if meaning == "closed at the end":
            if self._end_value(is_closed=True):
                is_whole = self._has_required if has_ended else self._has_all
                self._end_call(is_certain=is_whole)
        elif meaning == "not closed" and self._nested is None:
            self._end_unclosed([])
        elif self._nested is not None:
            self._break_at_nested([])

    # Between tags

    def _take_function(self, piece: Markup) -> None:
        if piece.sign == "F" and piece.tag is not None:
            self._function = piece.tag.name
            self._take = self._take_member
        else:
            self.has_failed = piece.sign != " "

    def _take_member(self, piece: Markup) -> None:
        """What stands between parameters."""
        tag, sign = piece.tag, piece.sign
        gap, self._gap = self._gap, self._gap + piece.text if sign == " " else ""
        if sign == "P" and tag is not None:
            self._open_parameter(tag.name, indent=gap.rpartition("\n")[2] if "\n" in gap else "")
        elif sign == "f":
            self._start()
            self._take = self._take_end
            if self._is_bare:
                self._end_call()
        elif sign == "t" and self._written and self._has_required:
            self._take = self._take_behind
        elif sign == "T" and self._written and self._has_required:
            self._pending = [piece]
            self._take = self._take_behind
        elif sign == "F" and self._written:
            self._end_call(leftover=[piece], is_certain=self._has_required)
        else:
            is_again = sign == "p" or (sign == "F" and tag is not None and tag.name == self._function)
            self.has_failed = sign != " " and not (is_again and bool(self._written) == (sign == "p"))

    def _take_end(self, piece: Markup) -> None:
        """What follows the function's end: more closing tags, or what stands behind the call."""
        if piece.sign == "t":
            self._end_call()
        elif piece.sign == "P":
            self.has_failed = True
        elif piece.sign == " ":
            self._pending.append(piece)
        elif piece.sign not in "fp":
            self._end_call(leftover=[*self._pending, piece])

    def _take_behind(self, piece: Markup) -> None:
        """Behind a tag that ends the call, though its function is open: a parameter here makes that doubtful."""
        if piece.sign == " ":
            self._pending.append(piece)
        elif piece.sign == "P":
            self.has_failed = True
        elif piece.sign not in "fpt":
            self._end_call(leftover=[*self._pending, piece])

    def _read_object(self, reader: JsonReader, text: str, start: int, end: int) -> int:
        place = reader.feed(text, start, end)
        self._write(reader.take().removesuffix("}" if reader.is_done else ""))
        self.has_failed = reader.has_failed
        if reader.is_done:
            self._object = None
            self._take = self._take_object_end
        return place

    def _take_object_end(self, piece: Markup) -> None:
        """Behind arguments written as JSON."""
        if piece.sign == "f":
            self._take = self._take_end
            if self._is_bare:
                self._end_call()
        elif piece.sign == "t":
            self._end_call()
        else:
            self.has_failed = piece.sign != " "

    def _open_parameter(self, name: str, *, indent: str = "") -> None:
        self._start()
        self._take = self._take_value
        self._parameter = name
        self._value = ValueText(self._tools.types_of(self._function, name), indent=indent)
        self._is_line_blank = True
        self._tail, self._has_opening = "", False
        self._is_again = name in self._written
        if not self._is_again:
            self._write(("," + " " if self._written else "{") + json.dumps(name, ensure_ascii=False) + ": ")
            self._written[name] = ""

    # Inside a value

    def _take_value(self, piece: Markup) -> None:
        if self._nested_depth:
            self._nested_depth += (piece.sign == self._nested_sign) - (piece.sign == self._nested_sign.lower())
            self._add(piece.text)
        elif not self._pending:
            self._begin(piece)
        elif piece.sign == " ":
            self._pending.append(piece)
        else:
            self._decide(self._meaning(piece.sign), piece)

    def _begin(self, piece: Markup) -> None:
        """A piece with nothing undecided before it."""
        tag, sign = piece.tag, piece.sign
        is_apart = self._is_line_blank or self._value.is_compact
        if tag is None or not (is_apart or sign == "p"):
            self._add(piece.text)
        elif tag.closes:
            self._pending, self._signs = [piece], sign
            self._is_pending_apart = is_apart
        elif sign == "P":
            self._take_parameter(tag.name, piece)
        else:
            self._pending, self._signs = [piece], sign
            self._is_pending_apart = True

    def _take_parameter(self, name: str, piece: Markup) -> None:
        """An opening tag on a line of its own: if the tool has it, the closing tag before it was forgotten."""
        known = self._tools.arguments(self._function)
        if known and name not in known:
            self._add(piece.text)
        elif self._nested is not None:
            self._break_at_nested([piece])
        elif self._value.is_blank:
            self.has_failed = name != self._parameter
            self._value.restart()  # an opening tag too many
        elif not known or name in self._written:
            self.has_failed = True
        elif self._end_value(is_closed=False):
            self._open_parameter(name)

    def _meaning(self, sign: str) -> str:
        signs = self._signs + sign
        return next((meaning for pattern, meaning in _RULES if pattern.fullmatch(signs)), "two ways")

    def _decide(self, meaning: str, piece: Markup) -> None:
        is_apart = self._is_pending_apart
        if self._signs in ("T", "F") and piece.text.startswith("{"):
            meaning = "nested"
        if not is_apart and (meaning == "again" or (meaning == "closed" and piece.sign in "tTF")):
            meaning = "text"
        if meaning == "text" and is_apart and self._is_out_of_place(piece.sign):
            meaning = "two ways"
        if meaning == "closed":
            if self._end_value(is_closed=True):
                self._take = self._take_member
                self._take_member(piece)
        elif meaning == "text":
            first, *others = self._pending
            self._pending, self._signs = [], ""
            self._add(first.text)
            for other in (*others, piece):
                self._take(other)
        elif meaning == "nested":
            self._open_nested(piece)
        elif meaning == "open":
            self._pending.append(piece)
            self._signs += piece.sign
        elif meaning == "not closed":
            self._end_unclosed([piece])
        else:
            self.has_failed = meaning != "again"

    def _is_out_of_place(self, sign: str) -> bool:
        """Whether a tag that stands alone in its line is hardly text of the value: nothing in it opens or closes it."""
        if self._signs == "p":
            return True  # an opening tag may have been forgotten
        if self._value.is_blank or (self._signs in ("T", "F") and sign != "p"):
            return False
        return not self._has_opening if sign in "fP" or sign == "p" else False

    def _open_nested(self, piece: Markup) -> None:
        """A call begins inside the value."""
        pending, self._pending = self._pending, []
        self._nested_sign, self._signs = self._signs, ""
        self._nested_depth = 1
        if self._nested is None:
            self._nested = []
        for entry in pending:
            self._add(entry.text)
        self._take(piece)

    def _end_unclosed(self, following: Sequence[Markup]) -> None:
        """The call ends here, its last value where the pending tags began."""
        if self._nested is not None:
            self._break_at_nested(following)
        elif self._end_value(is_closed=False):
            is_own = bool(following) and following[0].sign == "t"
            self._end_call(leftover=() if is_own else following)

    def _add(self, text: str) -> None:
        line = text.rpartition("\n")
        self._tail = self._tail[-10:] + text
        self._has_opening = self._has_opening or "<function" in self._tail or "<tool_call" in self._tail
        self._is_line_blank = (bool(line[1]) or self._is_line_blank) and not line[2].strip(" \t")
        if self._nested is not None:
            self._nested.append(text)
        else:
            self._value.add(text)
            self._write(self._value.take())

    def _end_value(self, *, is_closed: bool) -> bool:
        """Write the value's end. Fails where that is not certain, or the parameter has another value already."""
        for text in self._nested or ():
            self._value.add(text)
        self._nested = None
        self._pending, self._signs = [], ""
        rest = self._value.end(is_closed=is_closed)
        self.has_failed = rest is None or (self._is_again and self._written[self._parameter] != self._value.whole)
        if not self.has_failed:
            self._write(rest or "")
            self._written[self._parameter] = self._value.whole
        return not self.has_failed

    def _break_at_nested(self, following: Sequence[Markup]) -> None:
        """The value is not closed: what looks like a call inside it may be the next call."""
        self.leftover = "".join([*(self._nested or ()), *(piece.text for piece in (*self._pending, *following))])
        self.has_failed = True

    # The call

    @property
    def _has_required(self) -> bool:
        return self._tools.required(self._function) <= self._written.keys()

    @property
    def _has_all(self) -> bool:
        """Whether nothing could follow."""
        names = self._tools.arguments(self._function)
        return bool(names) and names.keys() <= self._written.keys()

    def _start(self) -> None:
        if not self.has_started:
            self.has_started = True
            self.events.append(CallStart(self._function))

    def _write(self, text: str) -> None:
        if text and not (self._is_again and self._take == self._take_value):
            self.events.append(CallArguments(text))

    def _end_call(self, *, leftover: Sequence[Markup] = (), is_certain: bool = True) -> None:
        if not is_certain or (self._is_bare and not self._has_required):
            self.has_failed = True
            return
        self.leftover = "".join(piece.text for piece in leftover)
        self._is_again = False
        self._write("}" if self._written or self._has_object else "{}")
        self.events.append(CallEnd())
        self.has_started = False
        self.is_done = True
