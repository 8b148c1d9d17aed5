"""The log that the verbs of `qnext audit` read, and moments in it."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.moments import moment
from qnext.errors import UsageError

Log = Annotated[Path, typer.Argument(metavar="FILE", help="what `qnext serve --audit-log` has written")]


def existing_log(path: Path) -> Path:
    """Raises UsageError for what is no file, and for a log without a line."""
    from qnext.server.access.audit_reading import log_files

    files = log_files(path)
    if not all(file.is_file() for file in files):
        raise UsageError(f"{path}: no such file")
    if not any(file.stat().st_size for file in files):
        raise UsageError(f"{path}: holds no line")
    return path


def as_logged(text: str | None, flag: str, now: float) -> str | None:
    """A moment in the past as the log writes times."""
    if text is None:
        return None
    found = datetime.fromtimestamp(moment(text, flag, now, is_past=True), timezone.utc)
    return found.isoformat(timespec="milliseconds").replace("+00:00", "Z")
