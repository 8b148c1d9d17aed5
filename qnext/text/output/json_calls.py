"""Calls as the instruct and thinking formats write them: a JSON object between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

from qnext.text.output.events import Call
from qnext.text.output.scan import TOOL_CALL, TOOL_CALL_END, WHITE_SPACE, JsonScanner, skip_space, tag_at
from qnext.text.output.strict_json import is_json_object, object_members


class JsonCallReader:
    """Reads one call behind its opening tag."""

    is_bare = False

    def __init__(self) -> None:
        self.is_done = False
        self.has_failed = False
        self._scanner = JsonScanner()
        self._is_open = False  # the object has begun

    def feed(self, text: str, start: int, end: int) -> int:
        """Read text[start:end]; returns how far. What is left begins a tag, or is what cannot be."""
        scanner = self._scanner
        if not self._is_open:
            start = skip_space(text, start, end)
            if start == end:
                return start
            self._is_open = text[start] == "{"
            self.has_failed = not self._is_open
        if self.has_failed:
            return start
        if not scanner.is_done:
            start = scanner.feed(text, start, end)
            self.has_failed = scanner.has_failed
        if scanner.is_done:
            start = skip_space(text, start, end)
            tag = tag_at(text, start, end, (TOOL_CALL_END,))
            self.has_failed = tag == ""
            self.is_done = bool(tag)
            start += len(tag or "")
        return start

    def call(self, text: str) -> Call | None:
        """The call in the whole text with its tags; None where it is not one."""
        try:
            members = object_members(text[len(TOOL_CALL) : -len(TOOL_CALL_END)].strip(WHITE_SPACE))
        except ValueError:
            return None
        name, _ = members.get("name", (None, ""))
        value, arguments = members.get("arguments", (None, ""))
        if value is None or value == "":
            arguments = "{}"
        elif isinstance(value, str):  # some models write the object as a text that holds it
            arguments = value.strip(WHITE_SPACE)
        if not isinstance(name, str) or not name or not is_json_object(arguments):
            return None
        return Call(name, arguments)
