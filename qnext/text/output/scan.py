"""White space and the tags of calls in text that arrives in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
WHITE_SPACE = " \t\r\n"

TagKind = Literal["tool_call", "function", "parameter", "think"]
KINDS: tuple[TagKind, ...] = ("tool_call", "function", "parameter", "think")
CALL_KINDS: tuple[TagKind, ...] = KINDS[:3]
MAX_TAG_LENGTH = 300  # characters

_SPACE = re.compile(r"[ \t\r\n]*")
# <function=name>, also with white space, quotes, or as an attribute: <function name="name">. The ">" of a closing tag
# may be missing at the end of a line.
_TAG = re.compile(
    r"<[ \t]*(?P<slash>/)?[ \t]*(?P<kind>tool_call|function|parameter|think)"
    r"(?P<named>[ \t]*=|[ \t]+name[ \t]*=)?"
    r"(?(named)[ \t]*(?:\"(?P<double>[^\"<>\n]*)\"|'(?P<single>[^'<>\n]*)'|(?P<bare>[^<>\n]*?)))"
    r"[ \t]*(?(slash)(?:>|(?=\n))|>)"
)
_TAG_HEAD = re.compile(r"<[ \t]*/?[ \t]*([a-z_]*)")
_TAG_REST = re.compile(r"[ \t=][^<>\n]*")


class Tag(NamedTuple):
    """A tag in a text: its kind, whether it closes, its name ("" for none), and its length in characters."""

    kind: TagKind
    closes: bool
    name: str
    length: int

    @property
    def opens_call(self) -> bool:
        return not self.closes and (self.kind == "tool_call" or (self.kind == "function" and self.name != ""))


def skip_space(text: str, start: int, end: int) -> int:
    """Where the white space that stands at `start` ends."""
    match = _SPACE.match(text, start, end)
    assert match is not None, "the expression matches nothing too"
    return match.end()


def tag_at(text: str, start: int, end: int, kinds: Sequence[TagKind]) -> Tag | Literal[False] | None:
    """The tag that stands at `start`, where a "<" is: False for none, None while text[start:end] cannot tell.

    A tag without the name that its kind has is none: `<function>` is text, `</function>` a tag.
    """
    end = min(end, start + MAX_TAG_LENGTH)
    match = _TAG.match(text, start, end)
    if match is None:
        return None if end - start < MAX_TAG_LENGTH and _may_become_tag(text, start, end, kinds) else False
    kind: TagKind = match["kind"]  # type: ignore[assignment]
    name = match["double"] or match["single"] or match["bare"] or ""
    closes = match["slash"] is not None
    is_named = kind in ("function", "parameter")
    if kind not in kinds or (not closes and bool(name) != is_named) or (name and not is_named):
        return False
    return Tag(kind, closes, name, match.end() - start)


def _may_become_tag(text: str, start: int, end: int, kinds: Sequence[TagKind]) -> bool:
    head = _TAG_HEAD.match(text, start, end)
    assert head is not None, "a tag begins with <"
    if head.end() == end:
        return any(kind.startswith(head[1]) for kind in kinds)
    return head[1] in kinds and _TAG_REST.fullmatch(text, head.end(), end) is not None
