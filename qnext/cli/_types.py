"""Kinds of values that flags of several verbs take."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any

import typer

from qnext.errors import QnextWarning

_FACTORS = {
    "": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
    "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4,
}  # fmt: skip
_HUMAN = re.compile(r"([0-9][0-9_,]*)(?:\.([0-9]+))?([kmgtKMGT]?)")


def human_int(text: str | int) -> int:
    """A whole number, with k, m, g, t for powers of 1,000 and K, M, G, T for powers of 1,024. For
    `typer.Option(parser=human_int)`. Raises ValueError, which typer turns into a usage error.

    >>> human_int("32k"), human_int("32K"), human_int("25.6k"), human_int("4,096")
    (32000, 32768, 25600, 4096)
    """
    found = _HUMAN.fullmatch(str(text).strip())
    if found is None or len(str(text)) > 40:
        raise ValueError(f"{str(text)[:40]!r} is no whole number such as 4096, 32k (32,000) or 32K (32,768)")
    whole, fraction, unit = found.groups(default="")
    # In whole numbers: a float would not hold every large one.
    value, rest = divmod(int(re.sub("[_,]", "", whole) + fraction) * _FACTORS[unit], 10 ** len(fraction))
    if rest:
        raise ValueError(f"{text!r} is no whole number")
    return value


def _be_strict(value: bool) -> bool:
    """A warning about a file ends the verb, as the error that it names. `qnext.cli.main` undoes it at its end."""
    if not value:
        return value
    show = warnings.showwarning

    def raise_error(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if isinstance(message, QnextWarning):
            raise message.error(str(message))
        show(message, category, *rest, **more)

    warnings.showwarning = raise_error
    return value


Strict = Annotated[
    bool,
    typer.Option("--strict", callback=_be_strict, help="A warning about the model's files is an error."),
]
