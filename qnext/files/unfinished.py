"""A folder that several runs make: what one leaves behind a kill or an error, the next takes up."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qnext.errors import FULL, DiskFull, UsageError
from qnext.files.folders import remove_folder
from qnext.files.partial import delete, remove_partials
from qnext.files.writing import parents_of, sync_folder


class Unfinished:
    """`NAME.unfinished`: `made` will have the name of the folder, beside it the caller keeps what later runs need.

    Errors and kills leave it as it is once it `is_kept`, which is true from the start where an earlier run kept it.
    """

    def __init__(self, path: Path, *, is_kept: bool) -> None:
        self.path = path
        self.made = path / "made"
        self.is_kept = is_kept

    def clear(self, is_needed: Callable[[Path], bool]) -> None:
        """Delete what an earlier run has put into `made` and this one does not need."""
        for path in list(self.made.iterdir()):
            if not is_needed(path):
                delete(path)


@contextmanager
def unfinished_folder(folder: str | Path) -> Iterator[Unfinished]:
    """A folder that takes its name when the block ends well, in the run that finishes it.

    The caller flushes what later runs rely on, and knows that nothing has the name. Errors of the disk say that the
    same command goes on. Raises UsageError while another process is at it.
    """
    target = Path(folder).absolute()
    place = unfinished_of(target)
    with parents_of(target), _telling(Path(folder), place), _owned(place) as was_there:
        work = Unfinished(place, is_kept=was_there)
        try:
            work.made.mkdir(exist_ok=True)
            sync_folder(place)
            sync_folder(target.parent)
            yield work
        except BaseException:
            if not work.is_kept:
                delete(place)
            raise
        for inner, _, _ in os.walk(work.made):
            sync_folder(inner)
        os.rename(work.made, target)  # an empty folder gives way
        sync_folder(target.parent)
        with suppress(OSError):  # then `remove_finished` finds it
            remove_folder(place)


def unfinished_of(folder: str | Path) -> Path:
    """Where a folder is made by several runs."""
    target = Path(folder).absolute()
    return target.with_name(f"{target.name}.unfinished")


def remove_finished(folder: str | Path) -> None:
    """Delete what a run that was killed at its very end has left beside the folder, which is whole."""
    place = unfinished_of(folder)
    remove_partials(place.parent, place.name)
    if place.is_dir() and not (place / "made").exists() and Path(folder).exists():
        with _owned(place):
            remove_folder(place)


@contextmanager
def _owned(place: Path) -> Iterator[bool]:
    """The folder, made where it is not there, under a lock that ends with the process. Gives whether it was there."""
    was_there = place.is_dir()
    place.mkdir(exist_ok=True)
    lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{place}: another process is at it") from None
        except OSError:
            pass  # a system without locks
        yield was_there
    finally:
        os.close(lock)


@contextmanager
def _telling(shown: Path, place: Path) -> Iterator[None]:
    """An OSError about a file inside says that the work can go on."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | Path) or not Path(error.filename).is_relative_to(place):
            raise
        text = f"{error.strerror or error}; {shown} is not finished, and the same command goes on"
        if error.errno in FULL:
            raise DiskFull(f"{error.filename}: {text}") from None
        raise OSError(error.errno, text, str(error.filename)) from None
