"""Text of a model on the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from qnext.errors import UsageError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_text(text: str) -> None:
    """Model text to stdout at once."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


def printable(text: str, stream: TextIO) -> str:
    """Model text as `stream` can have it.

    What it cannot encode is replaced. On a terminal control characters are too: a model may repeat escape sequences
    that it has read somewhere.
    """
    if stream.isatty():
        text = _CONTROL.sub("\ufffd", text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def read_stdin() -> str:
    """All of standard input. Raises UsageError where it is not UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}") from None


def note(text: str) -> None:
    """A line beside the text, to stderr."""
    print(text, file=sys.stderr, flush=True)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
