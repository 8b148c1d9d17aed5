"""The text of one argument while it comes."""

from __future__ import annotations

import json

from qnext.text.output.values import STRING, Types, json_of_value


class ValueText:
    """Text between an argument's tags to JSON. One newline at either side belongs to the tags.

    The text of a string is certain as it comes, but for newlines at its end; any other value is held until it is whole.
    """

    def __init__(self, types: Types) -> None:
        self.is_compact = False  # it began on the line of its tag
        self.is_blank = True
        self.whole = ""  # JSON, once it has ended
        self._is_string = types == STRING
        self._types = types
        self._pieces: list[str] = []
        self._newlines: list[str] = []  # at the end
        self._unsent: list[str] = []
        self._has_begun = False
        self._mark = '"'  # before the first text that is sent

    def restart(self) -> None:
        """Forget the white space that has come."""
        self._pieces.clear()
        self._newlines.clear()
        self._unsent.clear()
        self._has_begun = False

    def add(self, text: str) -> None:
        if not self._has_begun and text:
            self._has_begun = True
            self.is_compact = text[0] not in "\r\n"
            text = text.removeprefix("\n")
        if not text:
            return
        self._pieces.append(text)
        self.is_blank = self.is_blank and not text.strip()
        solid = text.rstrip("\n")
        if solid:
            self._unsent += [*self._newlines, solid]
            self._newlines.clear()
        self._newlines.append(text[len(solid) :])

    def take(self) -> str:
        """The JSON that is certain since the last time."""
        if not self._is_string or not self._unsent:
            return ""
        unsent = "".join(self._unsent)
        self._unsent.clear()
        mark, self._mark = self._mark, ""
        return mark + json.dumps(unsent, ensure_ascii=False)[1:-1]

    def end(self, *, is_closed: bool) -> str | None:
        """The rest of the JSON; None where it is not certain.

        That is so without a closing tag, where newlines at the end may belong to the value, and for a broken list or
        object.
        """
        text = "".join(self._pieces)
        value = text.removesuffix("\n")
        if not is_closed:
            value = text.rstrip("\n")
            if self.is_blank or (len(text) - len(value) > 1 and "\n" in value and self._is_string):
                return None
        whole = json_of_value(value, self._types)
        if whole is None:
            return None
        self.whole = whole
        if not self._is_string:
            return whole
        newlines = "".join(self._newlines)[:-1] if is_closed else ""
        return self.take() + self._mark + json.dumps(newlines)[1:]
