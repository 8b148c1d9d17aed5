"""`qnext audit verify`: whether the audit log of a server is whole."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated

import typer

from qnext.cli.flags.auditing import Log, existing_log
from qnext.cli.flags.values import AsJson, option
from qnext.errors import CorruptCheckpoint, UsageError

_MOST_SHOWN = 20


def command(
    log: Log,
    *,
    expect: Annotated[
        str | None, option("the hash of a line, as an earlier check printed it", "--expect", metavar="HASH")
    ] = None,
    lines: Annotated[int | None, option("how many lines that check printed", "--lines", metavar="N")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that each line of a chained audit log follows the one before, the files it was rotated to included.

    Prints the number of lines and the hash of the last. Keep both elsewhere and give them to a later check as --expect
    and --lines: then lines that were taken away at the end show too. Exit code 5 where something is wrong.
    """
    from qnext.server.access.audit_reading import Anchor, verify_chain

    if expect is None and lines is not None:
        raise UsageError("--lines says where --expect HASH stood; give both")
    if expect is not None and not re.fullmatch("[0-9a-f]{64}", expect):
        raise UsageError("--expect must be 64 hex digits, as `qnext audit verify` prints them")
    found = verify_chain(existing_log(log), None if expect is None else Anchor(expect, lines))
    if as_json:
        document = {"file": str(log), "ok": not found.faults, "error": found.error, **asdict(found)}
        print(json.dumps(document, indent=2))
        if found.faults:
            raise typer.Exit(CorruptCheckpoint.exit_code)
        return
    if found.faults:
        more = f"; and {len(found.faults) - _MOST_SHOWN} more" if len(found.faults) > _MOST_SHOWN else ""
        raise CorruptCheckpoint("; ".join(found.faults[:_MOST_SHOWN]) + more)
    oldest = "from the first on" if found.is_from_start else "the oldest kept; those before were rotated away"
    anchored = "" if expect is None else "; the expected hash is among them"
    print(f"{log}: {found.num_lines} lines are whole ({oldest}){anchored}; the last is {found.last}")
