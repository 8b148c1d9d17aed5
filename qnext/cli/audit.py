"""`qnext audit`: whether the audit log of a server is whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.values import AsJson


def command(
    log: Annotated[Path, typer.Argument(metavar="FILE", help="what `qnext serve --audit-chain` has written")],
    as_json: AsJson = False,
) -> None:
    """Check that each line of a chained audit log follows the one before, the files it was rotated to included.

    Prints the number of lines and the hash of the last: kept elsewhere, it shows later whether lines at the end were
    taken away, which no chain can. Exit code 5 where a line was changed or taken out.
    """
    from qnext.errors import CorruptCheckpoint, UsageError
    from qnext.server.access.audit import verify_chain

    if not log.is_file():
        raise UsageError(f"{log}: no such file")
    found = verify_chain(log)
    if not found.num_lines and found.error is None:
        raise UsageError(f"{log}: holds no line")
    if as_json:
        print(json.dumps({"file": str(log), "ok": found.error is None, **asdict(found)}, indent=2))
    elif found.error is None:
        print(f"{log}: {found.num_lines} lines are whole; the last is {found.last}")
    if found.error is not None:
        if as_json:
            raise typer.Exit(CorruptCheckpoint.exit_code)
        raise CorruptCheckpoint(found.error)
