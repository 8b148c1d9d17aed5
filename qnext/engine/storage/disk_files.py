"""The files of a disk store: one for each entry, in a private folder that is reached by a descriptor alone."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from qnext.engine.storage.disk_entry import (
    DIGEST_BYTES,
    DamagedEntry,
    Header,
    PrefixHasher,
    encode_header,
    prefix_of,
    read_body,
    read_header,
)
from qnext.engine.storage.disk_folder import LOCK_FILE, lock_folder, open_folder
from qnext.errors import UsageError

ENTRY_SUFFIX = ".entry"
PARTIAL_SUFFIX = ".part"

# The process lacks something, the file may be good.
_PASSING_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}


class FoundEntry(NamedTuple):
    used_at: int  # nanoseconds; the file's time
    name: str
    header: Header
    num_bytes: int  # of the file


class FoundFiles(NamedTuple):
    """What lay in the folder. Damaged files have been deleted, foreign ones were left alone."""

    entries: list[FoundEntry]  # what was used longest ago first
    num_damaged: int
    num_foreign: int


class EntryFiles:
    """Entries as files, named by a hash of what they are of; the folder is this object's until `close`.

    Raises UsageError when the folder is another's, writable by others, a link, in use, or no store. Methods may be
    called from several threads, those that change one name from one at a time.
    """

    def __init__(self, folder: Path, *, fingerprint: bytes) -> None:
        self.folder = folder
        self.stuck_bytes = 0  # of files that could not be deleted
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._folder_fd = open_folder(folder)
            stack.callback(os.close, self._folder_fd)
            stack.callback(os.close, lock_folder(self._folder_fd, folder))
            self._descriptors = stack.pop_all()

    def close(self) -> None:
        self._descriptors.close()

    def scan(self) -> FoundFiles:
        """Whole entries of this fingerprint; others are deleted. Raises UsageError where the process lacks
        descriptors or memory to look."""
        found: list[FoundEntry] = []
        num_damaged = num_foreign = 0
        for file in os.listdir(self._folder_fd):
            name, suffix = os.path.splitext(file)
            if suffix not in (ENTRY_SUFFIX, PARTIAL_SUFFIX):
                num_foreign += file != LOCK_FILE
                continue
            try:
                if suffix == PARTIAL_SUFFIX or len(name) != 2 * DIGEST_BYTES:
                    raise DamagedEntry("half written, or named by another")
                with self._open(name) as opened:
                    status = os.fstat(opened.fileno())
                    header = read_header(opened, self._fingerprint)
                found.append(FoundEntry(status.st_mtime_ns, name, header, status.st_size))
            except (DamagedEntry, OSError) as error:
                if is_passing(error):
                    assert isinstance(error, OSError)
                    raise UsageError(f"prefix cache {self.folder}: {error.strerror}") from error
                num_damaged += 1
                self._unlink(file)
        return FoundFiles(sorted(found, key=lambda entry: entry[:2]), num_damaged, num_foreign)

    def read(self, name: str) -> tuple[Header, Tensor]:
        """The file's own header and its verified body. Raises DamagedEntry, OSError, and RuntimeError for lack of
        memory; see `is_passing`."""
        with self._open(name) as file:
            header = read_header(file, self._fingerprint)
            body_B = read_body(file, header)
        hasher = PrefixHasher(self._fingerprint, header.kind, header.salt)
        if hasher.name(header.tokens(body_B)) != name:
            raise DamagedEntry("under the name of another")
        return header, body_B

    def write(self, name: str, header: Header, body_B: Tensor) -> None:
        """Under another name first: a file with an entry's name was written whole. Raises OSError; then nothing is
        left of it."""
        try:
            self._write(name, header, body_B)
        except OSError:
            self._unlink(name + PARTIAL_SUFFIX)
            raise

    def _write(self, name: str, header: Header, body_B: Tensor) -> None:
        header_bytes = encode_header(header, self._fingerprint)
        partial, final = name + PARTIAL_SUFFIX, name + ENTRY_SUFFIX
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o600, dir_fd=self._folder_fd)
        try:
            for part in (prefix_of(header_bytes, body_B) + header_bytes, body_B.numpy().data):
                waiting = memoryview(part)
                while waiting.nbytes:
                    waiting = waiting[os.write(descriptor, waiting) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # The folder itself is not synchronised: a name that a power failure takes back is an entry less.
        os.replace(partial, final, src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)

    def touch(self, name: str, used_at: int) -> None:
        """Last use is the file's time, in nanoseconds; where it cannot be set, it stays."""
        with contextlib.suppress(OSError, OverflowError):
            os.utime(name + ENTRY_SUFFIX, ns=(used_at, used_at), dir_fd=self._folder_fd, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Delete an entry's file. What stays is counted in `stuck_bytes`."""
        self._unlink(name + ENTRY_SUFFIX)

    def _unlink(self, file: str) -> None:
        try:
            os.unlink(file, dir_fd=self._folder_fd)
        except FileNotFoundError:
            pass
        except OSError:
            with contextlib.suppress(OSError), self._lock:
                self.stuck_bytes += os.stat(file, dir_fd=self._folder_fd, follow_symlinks=False).st_size

    def _open(self, name: str) -> BinaryIO:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name + ENTRY_SUFFIX, flags, dir_fd=self._folder_fd)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            os.close(descriptor)
            raise DamagedEntry("not a private file")
        return os.fdopen(descriptor, "rb", buffering=0)


def is_passing(error: Exception) -> bool:
    """Whether reading failed because the process lacks descriptors or memory, so that the file may be good."""
    return isinstance(error, RuntimeError) or getattr(error, "errno", None) in _PASSING_ERRORS
