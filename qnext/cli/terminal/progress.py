"""Progress on stderr, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qnext.session.folder import Report

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def bars(*middle: str, **options: Any) -> Iterator[Progress | None]:
    """Bars on stderr with columns of rich by name before the time that is left; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    import rich.progress
    from rich.console import Console

    columns = (getattr(rich.progress, name)() for name in ("BarColumn", *middle, "TimeRemainingColumn"))
    with rich.progress.Progress(
        "{task.description}", *columns, console=Console(stderr=True), transient=True, **options
    ) as progress:
        yield progress


@contextmanager
def _counted(label: str, *middle: str) -> Iterator[Report | None]:
    with bars(*middle) as progress:
        if progress is None:
            yield None
            return
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def byte_progress(label: str) -> Any:
    """A context of a callback (bytes done, bytes in all) that draws a bar, or of None where stderr is no terminal."""
    return _counted(label, "DownloadColumn", "TransferSpeedColumn")


def token_progress(label: str) -> Any:
    """The same for a count of tokens."""
    return _counted(label, "MofNCompleteColumn")


@contextmanager
def count_progress(label: str, total: int) -> Iterator[Callable[[object], None] | None]:
    """A callback for each of `total` things; drawn four times a second, so that it costs what is measured little."""
    with bars("MofNCompleteColumn", refresh_per_second=4) as progress:
        if progress is None:
            yield None
            return
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task)
