"""An open file whose errors name it, and the flushing of files and folders to the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of a pipe, or a file system that has no such call


class NewFile:
    """A file that is being written, without a buffer. `path` is its present place, which its errors name."""

    def __init__(self, path: str | Path, *, mode: int = 0o666, flags: int = os.O_CREAT | os.O_EXCL) -> None:
        self.path = Path(path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | flags, mode)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.sync()
        finally:
            self.close()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of the data. Returns the number of bytes."""
        waiting = memoryview(data).cast("B")
        num_bytes = waiting.nbytes
        with named(self.path):
            while waiting.nbytes:
                waiting = waiting[os.write(self._descriptor, waiting) :]
        return num_bytes

    def seek(self, position: int) -> int:
        return os.lseek(self._descriptor, position, os.SEEK_SET)

    def tell(self) -> int:
        return os.lseek(self._descriptor, 0, os.SEEK_CUR)

    def fileno(self) -> int:
        return self._descriptor

    def sync(self) -> None:
        """Wait until the data is on the disk."""
        with named(self.path):
            sync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder are on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return  # a folder that one may write to but not read
    try:
        with named(folder):
            sync(descriptor)
    finally:
        os.close(descriptor)


def encoded(data: str | bytes) -> bytes:
    return data.encode("utf-8") if isinstance(data, str) else data


def sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:  # a pipe, or a file system without it
            raise


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = str(path) if error.filename is None else error.filename
        raise


@contextmanager
def parents_of(target: Path) -> Iterator[None]:
    """Make the folders above. Those that were made are removed again when the block fails."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_folder(folder.parent)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
