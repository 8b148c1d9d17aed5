"""Grammars in llama.cpp's GBNF, as Lark. Neither torch nor a library.

Rules that lead back to themselves become rules; all others become terminals, which are matched as one expression, so
that no cut between tokens of the grammar can matter inside of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qnext.errors import UsageError

_RULE_HEAD = re.compile(r"^[ \t]*[A-Za-z][\w-]*\s*::=", re.MULTILINE)
_MAX_DEPTH = 50  # of parentheses
_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<head>[A-Za-z][\w-]*\s*::=)|(?P<name>[A-Za-z][\w-]*)|(?P<text>"(?:[^"\\]|\\.)*")"""
    r"""|(?P<letters>\[(?:[^\]\\]|\\.)*\])|(?P<times>[*+?]|\{\d*(?:,\d*)?\})|(?P<mark><[^<>\s]+>)|(?P<sign>[()|.])""",
    re.DOTALL,
)
_LETTER = re.compile(
    r"\\x(?P<x>[0-9a-fA-F]{2})|\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})|\\(?P<e>.)|(?P<c>.)", re.DOTALL
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass
class _RulePart:
    """A part of a rule. `kind`: text, letters, mark or rule with its `lark`; or one, either or times of its `parts`."""

    kind: str
    lark: str = ""
    parts: list[_RulePart] = field(default_factory=list)


def is_gbnf(text: str) -> bool:
    """Whether a grammar has a rule in GBNF's form, which Lark knows none of."""
    return _RULE_HEAD.search(text) is not None


def lark_of(text: str) -> str:
    """Lark with the rule `start` for a grammar whose rule is `root`. Raises UsageError, in one line."""
    rules = _GbnfReader(text).rules()
    if "root" not in rules:
        raise UsageError("gbnf: there is no rule root")
    for node in rules.values():
        for name in _names(node):
            if name not in rules:
                raise UsageError("gbnf: a rule is used and not defined")
    regular = _regular(rules)
    names = {name: f"{'T' if name in regular else 'g'}{index}" for index, name in enumerate(rules)}
    lines = [f"start: {names['root']}"]
    terminals: list[str] = []
    for name, node in rules.items():
        if name in regular:
            lines.append(f"{names[name]}: {_written(node, names)}")
        else:
            lines.append(f"{names[name]}: {_written(_gathered(node, regular, names, terminals), names)}")
    return "\n".join([*lines, *terminals]) + "\n"


class _GbnfReader:
    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0

    def rules(self) -> dict[str, _RulePart]:
        found: dict[str, _RulePart] = {}
        while self._at < len(self._tokens):
            kind, value = self._tokens[self._at]
            if kind != "head":
                raise UsageError("gbnf: a rule begins with its name and ::=")
            self._at += 1
            found[value.removesuffix("::=").rstrip()] = self._either(0)
        return found

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def _either(self, depth: int) -> _RulePart:
        if depth > _MAX_DEPTH:
            raise UsageError(f"gbnf: more than {_MAX_DEPTH} parentheses inside one another")
        ways = [self._sequence(depth)]
        while self._peek() == ("sign", "|"):
            self._at += 1
            ways.append(self._sequence(depth))
        return ways[0] if len(ways) == 1 else _RulePart("either", parts=ways)

    def _sequence(self, depth: int) -> _RulePart:
        parts: list[_RulePart] = []
        while True:
            kind, value = self._peek()
            if kind in ("head", "end") or (kind == "sign" and value in "|)"):
                return _RulePart("one", parts=parts)
            self._at += 1
            if kind == "times":
                if not parts:
                    raise UsageError("gbnf: a repetition stands behind nothing")
                parts[-1] = _RulePart("times", _times(value), [parts[-1]])
            elif value == "(":
                parts.append(self._either(depth + 1))
                if self._peek() != ("sign", ")"):
                    raise UsageError("gbnf: a parenthesis is not closed")
                self._at += 1
            else:
                parts.append(_atom(kind, value))


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            line = text.count("\n", 0, at) + 1
            raise UsageError(f"gbnf: line {line} cannot be read")
        at = found.end()
        if found.lastgroup not in (None, "space"):
            yield str(found.lastgroup), found[0]


def _atom(kind: str, value: str) -> _RulePart:
    if kind == "name":
        return _RulePart("rule", value)
    if kind == "mark":
        return _RulePart("mark", value)
    if kind == "text":
        return _RulePart("text", json.dumps("".join(_letters(value[1:-1])), ensure_ascii=False))
    if kind == "letters":
        return _RulePart("letters", _class(value))
    return _RulePart("letters", "/(?s:.)/")  # a dot


def _letters(text: str) -> Iterator[str]:
    for found in _LETTER.finditer(text):
        code = found["x"] or found["u"] or found["U"]
        if code is not None and int(code, 16) > 0x10FFFF:
            raise UsageError("gbnf: a letter beyond Unicode")
        letter = chr(int(code, 16)) if code else found["c"] or _ESCAPES.get(found["e"], found["e"])
        if "\ud800" <= letter <= "\udfff":
            raise UsageError("gbnf: half of a letter")
        yield letter


def _class(value: str) -> str:
    inner = value[1:-1]
    is_not = inner.startswith("^")
    pieces = [found[0] for found in _LETTER.finditer(inner[is_not:])]
    written = ""
    for index, piece in enumerate(pieces):
        is_range = piece == "-" and 0 < index < len(pieces) - 1
        written += "-" if is_range else "".join(f"\\x{{{ord(letter):X}}}" for letter in _letters(piece))
    if not written:
        raise UsageError("gbnf: a class of letters is empty")
    return f"/[{'^' if is_not else ''}{written}]/"


def _times(value: str) -> str:
    if value in ("*", "+", "?"):
        return value
    least, comma, most = value[1:-1].partition(",")
    if not least and not most:
        raise UsageError("gbnf: a repetition without a number")
    return f"{{{least or 0},{most}}}" if comma else f"{{{least}}}"


def _names(node: _RulePart) -> Iterator[str]:
    if node.kind == "rule":
        yield node.lark
    for part in node.parts:
        yield from _names(part)


def _has_mark(node: _RulePart) -> bool:
    return node.kind == "mark" or any(map(_has_mark, node.parts))


def _regular(rules: dict[str, _RulePart]) -> set[str]:
    """The rules that lead neither back to themselves nor to a special token."""
    waiting = {name: set(_names(node)) for name, node in rules.items() if not _has_mark(node)}
    found: set[str] = set()
    while True:
        ready = {name for name, uses in waiting.items() if uses <= found} - found
        if not ready:
            return found
        found |= ready


def _is_regular(node: _RulePart, regular: set[str]) -> bool:
    return not _has_mark(node) and all(name in regular for name in _names(node))


def _gathered(node: _RulePart, regular: set[str], names: dict[str, str], terminals: list[str]) -> _RulePart:
    """The part of a rule with neighbours that are regular in one terminal each, which `terminals` takes up."""
    if _is_regular(node, regular):
        return _terminal([node], names, terminals)
    if node.kind != "one":
        return _RulePart(node.kind, node.lark, [_gathered(part, regular, names, terminals) for part in node.parts])
    parts: list[_RulePart] = []
    run: list[_RulePart] = []
    for part in [*node.parts, None]:
        if part is not None and _is_regular(part, regular):
            run.append(part)
            continue
        if run:
            parts.append(_terminal(run, names, terminals))
            run = []
        if part is not None:
            parts.append(_gathered(part, regular, names, terminals))
    return _RulePart("one", parts=parts)


def _terminal(nodes: Sequence[_RulePart], names: dict[str, str], terminals: list[str]) -> _RulePart:
    name = f"A{len(terminals)}"
    terminals.append(f"{name}: {_written(_RulePart('one', parts=list(nodes)), names)}")
    return _RulePart("text", name)


def _written(node: _RulePart, names: dict[str, str]) -> str:
    if node.kind == "rule":
        return names[node.lark]
    if node.kind == "one":
        return " ".join(_grouped(part, names) for part in node.parts) or '""'
    if node.kind == "either":
        return " | ".join(_grouped(part, names) for part in node.parts)
    if node.kind == "times":
        return _grouped(node.parts[0], names, always=True) + node.lark
    return node.lark


def _grouped(node: _RulePart, names: dict[str, str], *, always: bool = False) -> str:
    text = _written(node, names)
    return f"({text})" if node.kind == "either" or (always and node.kind in ("one", "times")) else text
