"""Folders, and the files inside a folder that is being made."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qnext.files.partial import delete, hidden, partial_folder, put_back, remove_partials
from qnext.files.telling import telling
from qnext.files.writing import CANNOT, NewFile, encoded, parents_of, sync_folder

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # Linux; Python has no names for them


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that gets its name when the block ends well, and is removed otherwise. Its parents are made.

    A folder that has the name already is removed when the new one is there. This is one step where the system can
    exchange names. Elsewhere a kill between two steps is possible; the next call then puts the old folder back. The
    caller has to know whether the old folder may be removed. Raises OSError and DiskFull; then the old folder stays
    unchanged.
    """
    target = Path(folder).absolute()
    with telling(Path(folder), target, had_one=_is_filled(target)) as told, parents_of(target):
        put_back(target)
        remove_partials(target.parent, target.name)
        with partial_folder(target) as temporary:
            yield temporary
            for inner, _, _ in os.walk(temporary):
                sync_folder(inner)
            _put(temporary, target)
            told.is_done = True
            sync_folder(target.parent)  # after an exchange, what is deleted now is the earlier folder


def write_inside(path: Path, data: str | bytes) -> None:
    """Write a file, flushed to the disk, into a folder that is being made."""
    with NewFile(path) as file:
        file.write(encoded(data))


def copy_inside(source: Path, path: Path) -> None:
    """Copy a file, flushed to the disk, into a folder that is being made."""
    with source.open("rb") as reading, NewFile(path) as file:
        while piece := reading.read(1 << 20):
            file.write(piece)


def remove_folder(folder: str | Path) -> None:
    """Remove a folder: its name is gone at once, then its data is deleted. `remove_partials` finds what a kill or an
    error leaves."""
    path = Path(folder).absolute()
    gone = hidden(path, "partial")
    with telling(Path(folder), path, had_one=True):
        os.rename(path, gone)
    with suppress(OSError):
        sync_folder(path.parent)  # else a power failure could bring back the name, with half of the files
    delete(gone)


@contextmanager
def scratch_folder(beside: Path | None = None) -> Iterator[Path]:
    """A private folder while the block lasts, on the disk of `beside` or in the system's place for temporary folders.

    A folder that a killed run left is removed when the next one is made.
    """
    target = Path(tempfile.gettempdir()) / "qnext" if beside is None else beside.absolute()
    remove_partials(target.parent, target.name)
    with partial_folder(target, mode=0o700) as temporary:
        made = temporary / target.name  # may be replaced as a whole: the lock is on the folder around it
        made.mkdir()
        yield made


def _put(new: Path, target: Path) -> None:
    if not _is_filled(target):
        os.rename(new, target)  # an empty folder gives way
    elif not exchange(new, target):
        aside = hidden(target, "old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(aside, target)
            raise
        delete(aside)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where the system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        return False
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
