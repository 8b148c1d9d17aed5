"""The text of errors: the intended file, and what happened to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qnext.errors import FULL, DiskFull
from qnext.files.partial import is_partial


class Told:
    is_done = False  # the new one has its name


@contextmanager
def telling(shown: Path, target: Path, *, had_one: bool) -> Iterator[Told]:
    """Makes an OSError about an unfinished file name its final path, as `shown`, and say what happened to it."""
    told = Told()
    try:
        yield told
    except OSError as error:
        place = _place(error, shown, target)
        if place is None:
            raise
        what = "it" if place == shown else str(shown)
        if told.is_done:
            what += " is complete, but a power failure may take it back"
        else:
            what += " stays as it was" if had_one else " was not made"
        text = f"{error.strerror or error}; {what}"
        if error.errno in FULL:
            raise DiskFull(f"{place}: {text}") from None
        raise OSError(error.errno, text, str(place)) from None


def _place(error: OSError, shown: Path, target: Path) -> Path | None:
    """The file that an error is about; None where that is neither what is being made nor a folder above it."""
    if not isinstance(error.filename, str | Path):
        return None
    path = Path(error.filename)
    if path in (target, shown):
        return shown
    if path in target.parents:
        return path
    inner = path.relative_to(target.parent) if path.is_relative_to(target.parent) else Path()
    return shown.joinpath(*inner.parts[1:]) if inner.parts and is_partial(Path(inner.parts[0])) else None
