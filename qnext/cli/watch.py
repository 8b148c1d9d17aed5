"""qnext watch: the page of a training run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from qnext.errors import UsageError


def command(
    run: Annotated[Path, typer.Argument(help="folder of the run, such as runs/mine", metavar="RUN")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; any other where it is taken")] = 8008,
) -> None:
    """Show a training run as a page, on this machine alone, until Ctrl-C. The run may go on or have ended."""
    from qnext.cli.terminal.text import note
    from qnext.diagnostics.run_page.serving import METRICS, serving

    if not run.is_dir():
        raise UsageError(f"{run}: no such folder")
    if not (run / METRICS).is_file():
        note(f"{run} holds no {METRICS} yet; the page waits for it")
    with serving(run, port=port) as address:
        print(address, flush=True)
        threading.Event().wait()
