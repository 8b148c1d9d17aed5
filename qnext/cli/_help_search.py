"""`qnext VERB --help=WORD`: only the options whose name or text has the word."""

from __future__ import annotations

import sys
import textwrap
from typing import Any


def print_matching(verb: str, command: Any, word: str) -> None:
    """Options of a verb that mention `word`, in either case, with their help; one line on stderr where none does."""
    context = command.make_context(f"qnext {verb}", [], resilient_parsing=True)
    with context:
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    found = [record for record in records if record is not None and word.casefold() in " ".join(record).casefold()]
    for name, text in found:
        print(f"  {name}")
        if text:
            print(textwrap.fill(" ".join(text.split()), 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if not found:
        print(f"qnext {verb}: no option mentions {word!r}", file=sys.stderr)
