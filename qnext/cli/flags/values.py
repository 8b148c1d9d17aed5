"""Kinds of values that flags of several verbs take."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from qnext.errors import QnextWarning

_FACTORS = {"": 1, **{k: 1000**n for n, k in enumerate("kmgt", 1)}, **{k: 1024**n for n, k in enumerate("KMGT", 1)}}
_HUMAN = re.compile(r"([0-9][0-9_,]*)(?:\.([0-9]+))?(?:([kmgtKMGT])(?:i?B)?)?")


def human_int(text: str | int) -> int:
    """A whole number, with k, m, g, t for powers of 1,000 and K, M, G, T (or KiB, GB) for powers of 1,024. For
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


def token_count(text: str | float) -> float:
    """A number of tokens as articles write it: k, M, B and T are powers of 1,000. Raises ValueError.

    >>> token_count("15T"), token_count("1.5b"), token_count("200000")
    (15000000000000.0, 1500000000.0, 200000.0)
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)([kmbt]?)", str(text).strip().removesuffix(".0").lower())
    if found is None or len(str(text)) > 40:
        raise ValueError(f"{str(text)[:40]!r} is no number of tokens such as 15T or 200k")
    return float(re.sub("[_,]", "", found[1])) * 1000.0 ** ("", "k", "m", "b", "t").index(found[2])


def option(help: str, *names: str, **more: Any) -> Any:
    """A flag; without `names` it has that of its parameter."""
    return typer.Option(*names, help=help, **more)


def panel(name: str) -> Callable[..., Any]:
    """`option` for flags that help shows under a heading."""
    return partial(option, rich_help_panel=name)


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

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a folder or a hub name")]
AsRecords = Annotated[
    bool,
    typer.Option("--records", help="each expert one aligned record in OUT, to be streamed; qnext alone reads them"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="A running server, such as http://host:8000.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="For that server.")]
