"""The text that a verb reads through a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qnext.cli.terminal.text import read_stdin
from qnext.errors import UsageError
from qnext.text.files import read_user_text


@dataclass(frozen=True)
class TextFlags:
    """One text, from one of three places."""

    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="the text; - reads standard input")] = None
    file: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text instead of TEXT")] = None

    def check(self) -> None:
        """Raises UsageError for none, and for two."""
        if (self.text is None) == (self.file is None):
            raise UsageError("give one text: TEXT, --text FILE, or - for standard input")

    def read(self) -> str:
        """Raises UsageError for a text that is none."""
        if self.file is not None:
            return read_user_text(self.file)
        found = read_stdin() if self.text == "-" else self.text
        if not found:
            raise UsageError("the text is empty")
        return found


def parse_tokens(text: str) -> list[int]:
    """Ids with commas between, or @FILE with a JSON list. Raises UsageError."""
    values: Any
    if text.startswith("@"):
        try:
            values = json.loads(Path(text[1:]).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--tokens {text}: not readable as JSON ({error})") from None
    else:
        try:
            values = [int(piece) for piece in text.split(",")] if text.strip() else []
        except ValueError:
            raise UsageError(f"--tokens {text[:60]!r}: must be integers with commas between, or @FILE") from None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UsageError(f"--tokens {text[:60]}: must be a list of integers")
    if not values:
        raise UsageError("--tokens: no token given")
    return values
