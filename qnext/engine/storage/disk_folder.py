"""The folder of a disk store: private, and one store's at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qnext.errors import UsageError

LOCK_FILE = "qnext-prefix-cache.lock"


def check_size(folder: Path, max_bytes: int) -> None:
    """Raises UsageError for a store that may hold nothing."""
    if max_bytes <= 0:
        raise UsageError(f"prefix cache {folder}: max_bytes is {max_bytes}, must be positive")


def open_folder(folder: Path) -> int:
    """A descriptor of the folder, which is made where it lacks; every file is reached through it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"prefix cache {folder}: {error.strerror} (it must be a folder and no link)") from error
    status = os.fstat(descriptor)
    wrong = ""
    if status.st_uid != os.geteuid():
        wrong = f"belongs to user {status.st_uid}"
    elif status.st_mode & 0o022:
        wrong = "is writable by others: chmod 700"
    if wrong:
        os.close(descriptor)
        raise UsageError(f"prefix cache {folder}: {wrong}")
    return descriptor


def lock_folder(folder_fd: int, folder: Path) -> int:
    """A lock that ends with the process, however that ends. Its file marks the folder as a store."""
    names = os.listdir(folder_fd)
    if names and LOCK_FILE not in names:
        raise UsageError(f"prefix cache {folder}: is neither empty nor a prefix cache")
    descriptor = -1
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(LOCK_FILE, flags, 0o600, dir_fd=folder_fd)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(folder_fd, 0o700)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        is_held = isinstance(error, BlockingIOError)
        reason = "another engine uses it; give each its own" if is_held else f"{LOCK_FILE}: {error.strerror}"
        raise UsageError(f"prefix cache {folder}: {reason}") from error
    return descriptor
