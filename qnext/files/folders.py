"""Folders, and the files in one that is being made."""

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
    """A folder that takes its name when the block ends well, and vanishes otherwise; its parents are made.

    What has the name already goes when the new folder is there: in one step where the system can exchange names, else
    the next call puts it back after a kill between two. Whether it may go, the caller has to know. Raises OSError and
    DiskFull: what was there stays as it was.
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
    """A file, on the disk, of a folder that is being made."""
    with NewFile(path) as file:
        file.write(encoded(data))


def copy_inside(source: Path, path: Path) -> None:
    """A copy, on the disk, as a file of a folder that is being made."""
    with source.open("rb") as reading, NewFile(path) as file:
        while piece := reading.read(1 << 20):
            file.write(piece)


def remove_folder(folder: str | Path) -> None:
    """Gone at once for whoever looks, then deleted; what a kill or an error leaves of it, `remove_partials` finds."""
    path = Path(folder).absolute()
    gone = hidden(path, "partial")
    with telling(Path(folder), path, had_one=True):
        os.rename(path, gone)
    with suppress(OSError):
        sync_folder(path.parent)  # else a power failure could bring back the name, with half of the files
    delete(gone)


@contextmanager
def scratch_folder(beside: Path | None = None) -> Iterator[Path]:
    """A private folder for the time of the block, on the disk of `beside` or where the system has such folders.

    One that a killed run left goes when the next is made.
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
    """Swap two names in one step. False where the system cannot."""
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
