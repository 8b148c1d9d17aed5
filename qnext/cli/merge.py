"""`qnext merge`: an adapter becomes part of a model folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.values import Strict


def command(
    adapter: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run with an adapter, or a folder in PEFT's form")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make; must be new or empty")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what it was trained on [default: what the adapter names]")
    ] = None,
    strict: Strict = False,
) -> None:
    """Write a model folder with the changes of a LoRA adapter, and print its path.

    Every weight keeps its form: bf16, fp32, FP8 or int4. What the adapter does not change, MTP included, is copied byte
    by byte. A packed weight is rounded again, and a line says what that cost.
    """
    from qnext.checkpoint.merge import merge_adapter
    from qnext.cli.terminal.progress import byte_progress

    with byte_progress("merging") as progress:
        report = merge_adapter(adapter, out, base=base, progress=progress)
    print("\n".join(report.lines()), file=sys.stderr)
    print(out)
