"""Patterns of JSON schemas, which are ECMAScript's, as the expressions of a grammar. Neither torch nor a library."""

from __future__ import annotations

import re

# The parts of an ECMAScript pattern, as far as a grammar's expressions read them otherwise or not at all.
_PART = re.compile(
    r"\\[pPu]\{[^}]*\}|\\c[A-Za-z]|\\.|\[\^?(?:\\.|[^\]\\])*\]|\(\?(?:<?[=!]|[>#])|\(\?P?<\w+>|\(\?[a-z-]*:|\(\?[a-z-]+\)"
    r"|\{\d+(?:,\d*)?\}|.",
    re.DOTALL,
)
_IN_CLASS = re.compile(r"\\.|.", re.DOTALL)


def held_pattern(pattern: str) -> str | None:
    """An ECMAScript pattern as the grammar's expressions write it; None for one that they cannot."""
    parts = _PART.findall(pattern)
    held: list[str] = []
    for index, part in enumerate(parts):
        if part == "^":
            is_held = index == 0 or parts[index - 1] in ("(", "|") or parts[index - 1].startswith("(?")
        elif part == "$":
            is_held = index == len(parts) - 1 or parts[index + 1] in (")", "|")
        elif part.startswith("(?"):
            is_held = part[-1] not in "=!>#" or (part.endswith(">") and "<" in part)
        elif part.startswith("\\"):
            is_held = len(part) > 1 and part[1] not in "bBkcZGzAe123456789"
            part = _escape(part)
        else:
            is_held = part not in ("[", "[]")
            part = _class(part) if part[0] == "[" else f"\\{part}" if part in ("{", "}") else part
        if not is_held:
            return None
        held.append(part)
    return "".join(held)


def _escape(part: str) -> str:
    return "\\x00" if part == "\\0" else part if part.isascii() else part[1:]


def _class(part: str) -> str:
    """A class of characters; brackets and signs of sets inside are letters to ECMAScript."""
    if part == "[^]":
        return "(?s:.)"
    inner = part[2:-1] if part.startswith("[^") else part[1:-1]
    kept = [
        "\\x08" if letter == "\\b" else f"\\{letter}" if letter in "[&~" else _escape(letter)
        for letter in _IN_CLASS.findall(inner)
    ]
    return part[: len(part) - len(inner) - 1] + "".join(kept) + "]"
