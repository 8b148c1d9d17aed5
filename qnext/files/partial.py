"""Hidden names of files and folders that are being made or removed, the locks of their makers, and the remains of
killed runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qnext.files.writing import NewFile
from qnext.interrupts import held

_LEFT = re.compile(r"\.(.+)\.(partial|old)-[0-9a-f]{12}", re.DOTALL)
_MAX_NAME_BYTES = 200  # of a name within a hidden one: a system allows 255 in all


def is_partial(path: Path) -> bool:
    """Whether this is a name of something that is being made or removed."""
    return _LEFT.fullmatch(path.name) is not None


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Delete what killed runs left in a folder when they made or removed `name`, or anything. Never fails."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = _LEFT.fullmatch(path.name)
            if found is None or (name is not None and found[1] != _short(name)):
                continue
            # What was moved aside is the only one while nothing has its name.
            if found[2] == "partial" or (name is not None and status(folder / name) is not None):
                _delete_if_left(path)


def _delete_if_left(path: Path) -> None:
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.geteuid():
                delete(path)
        finally:
            os.close(lock)


def put_back(target: Path) -> None:
    """Restore a folder that a killed run moved aside for another one, which then did not take its place."""
    if status(target) is not None or not target.parent.is_dir():
        return
    for path in list(target.parent.iterdir()):
        found = _LEFT.fullmatch(path.name)
        if found is not None and found.groups() == (_short(target.name), "old"):
            os.rename(path, target)
            return


@contextmanager
def partial_file(target: Path, *, mode: int) -> Iterator[NewFile]:
    """A file with a hidden name. It is deleted at the end of the block, unless it was renamed."""
    file: NewFile | None = None
    try:
        with held():
            file = _locked_file(target, mode)
        yield file
    finally:
        if file is not None:
            with held():
                delete(file.path)
                file.close()


@contextmanager
def partial_folder(target: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """The same for a folder."""
    made: tuple[Path, int] | None = None
    try:
        with held():
            made = path, _ = _locked_folder(target, mode)
        yield path
    finally:
        if made is not None:
            with held():
                delete(made[0])
                os.close(made[1])


def _locked_file(target: Path, mode: int) -> NewFile:
    while True:
        file = NewFile(hidden(target, "partial"), mode=mode)
        if _is_locked(file.fileno(), file.path):
            return file
        file.close()


def _locked_folder(target: Path, mode: int) -> tuple[Path, int]:
    """The folder, and a descriptor that holds its lock."""
    while True:
        path = hidden(target, "partial")
        os.mkdir(path, mode)
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _is_locked(lock, path):
                return path, lock
            os.close(lock)


def _is_locked(descriptor: int, path: Path) -> bool:
    """Lock what was just made. False where another run was quicker, took it for left, and deleted it."""
    with suppress(OSError):  # a system without locks: there, nobody deletes what others left
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    found = status(path)
    return found is not None and os.path.samestat(found, os.fstat(descriptor))


def delete(path: Path) -> None:
    """Delete as far as possible. The rest has a name that `remove_partials` finds."""
    found = status(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path, ignore_errors=True)
    elif found is not None:
        with suppress(OSError):
            os.unlink(path)


def hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{_short(target.name)}.{what}-{secrets.token_hex(6)}")


def _short(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) <= _MAX_NAME_BYTES:
        return name
    return os.fsdecode(raw[: _MAX_NAME_BYTES - 16]) + hashlib.sha256(raw).hexdigest()[:16]


def status(path: str | Path, *, follows: bool = False) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follows)
    except OSError:
        return None
