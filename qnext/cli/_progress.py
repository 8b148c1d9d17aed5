"""Progress on stderr, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]  # done, in all


@contextmanager
def byte_progress(label: str) -> Iterator[Report | None]:
    """A callback (bytes done, bytes in all) that draws a bar, or None where stderr is no terminal."""
    with _progress(label, in_bytes=True) as report:
        yield report


@contextmanager
def token_progress(label: str) -> Iterator[Report | None]:
    """The same for a count of tokens."""
    with _progress(label, in_bytes=False) as report:
        yield report


@contextmanager
def _progress(label: str, *, in_bytes: bool) -> Iterator[Report | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    middle = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = ("{task.description}", BarColumn(), *middle, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
