"""Single files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from qnext.files.partial import partial_file, remove_partials, status
from qnext.files.telling import telling
from qnext.files.writing import NewFile, encoded, named, parents_of, sync_folder


@contextmanager
def new_file(path: str | Path, *, mode: int | None = None, with_parents: bool = False) -> Iterator[NewFile]:
    """A file that gets its name when the block ends well, replacing an earlier one, and is removed otherwise.

    `mode` None is the mode of the earlier file, or of a new file of the process. The owner stays. A link stays a link.
    A pipe or a device is written to directly. Raises OSError and DiskFull; then the earlier file stays unchanged.
    """
    target = Path(os.path.realpath(path))
    found = status(path, follows=True)  # what /dev/stdout leads to has no name
    if found is not None and not stat.S_ISREG(found.st_mode):
        with NewFile(path, flags=0) as file:
            yield file
        return
    remove_partials(target.parent, target.name)
    parents = parents_of(target) if with_parents else nullcontext()
    first_mode = 0o666 if mode is None and found is None else mode or 0o600
    telling_of = telling(Path(path), target, had_one=found is not None)
    with telling_of as told, parents, partial_file(target, mode=first_mode) as file:
        yield file
        with named(file.path):
            _take_over(file.fileno(), found, with_mode=mode is None)
        file.sync()
        os.replace(file.path, target)
        told.is_done = True
        sync_folder(target.parent)


def write_file(path: str | Path, data: str | bytes, *, mode: int | None = None) -> None:
    """Put a whole file in place; see new_file. Text is UTF-8."""
    with new_file(path, mode=mode) as file:
        file.write(encoded(data))


def move_file(path: Path, target: Path) -> None:
    """Give its final name to a file that another program wrote, on the same disk."""
    with telling(target, target, had_one=target.exists()):
        with NewFile(path, flags=0) as file:
            file.sync()
        os.replace(path, target)
        sync_folder(target.parent)


def remove_file(path: Path) -> None:
    """Delete a file; one that is not there is no error."""
    with named(path):
        path.unlink(missing_ok=True)


def append(descriptor: int, data: bytes, *, path: str | Path) -> None:
    """Add data to the end of an open file with one write: all of it, or nothing and an OSError or DiskFull."""
    with telling(Path(path), Path(path), had_one=True), named(path):
        num_written = os.write(descriptor, data)
        if num_written < len(data):
            with suppress(OSError):  # a pipe has no length
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - num_written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _take_over(descriptor: int, found: os.stat_result | None, *, with_mode: bool) -> None:
    """Owner and mode of the earlier file."""
    if found is None:
        return
    own = os.fstat(descriptor)
    if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid):
        with suppress(OSError):
            os.fchown(descriptor, found.st_uid, found.st_gid)
    if with_mode:
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & 0o777)
