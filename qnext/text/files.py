"""Text files: small files of a model folder, JSON or not, with or without a byte-order mark, and files of the user."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnext.errors import CorruptCheckpoint, UsageError

# The released tokenizer.json is 11 MB, and the largest that are known have some 40; a file far above is not parsed.
MAX_BYTES = 64 << 20


def read_text(path: Path) -> str:
    """UTF-8 text without its byte-order mark. Raises CorruptCheckpoint for a file that is no text, too long, or
    unreadable."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise CorruptCheckpoint(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except CorruptCheckpoint:
        raise
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: {first_line(error)}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises CorruptCheckpoint, naming the file, for text that is no JSON."""
    try:
        return json.loads(read_text(path))
    except CorruptCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: {first_line(error)}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no file. Raises CorruptCheckpoint otherwise."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_user_text(path: Path) -> str:
    """A file that a user names, as text. Raises UsageError where it is unreadable, empty, binary or not UTF-8."""
    data = read_bytes(path)
    if not data.strip():
        raise UsageError(f"{path}: empty, there is nothing to read")
    if b"\0" in data:
        raise UsageError(f"{path}: holds NUL bytes, not a text file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_bytes(path: Path) -> bytes:
    """A file that a user names, as it is. Raises UsageError where it is unreadable or empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    if not data:
        raise UsageError(f"{path}: empty, there is nothing to read")
    return data


def find_files(names: Sequence[str]) -> list[Path]:
    """What names of files, of folders and patterns with * stand for, each file once.

    Of a folder these are all files below it that are not empty, but for those in hidden folders. Raises UsageError for
    a name that stands for none.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = [each for each in sorted(path.rglob("*")) if not _is_hidden(each.relative_to(path))]
            inside = [each for each in below if each.is_file() and each.stat().st_size]
        elif not path.exists() and glob.has_magic(name):
            inside = [Path(each) for each in sorted(glob.glob(name, recursive=True)) if Path(each).is_file()]
        else:
            inside = [path]
        if not inside:
            raise UsageError(f"{name}: no file in it" if path.is_dir() else f"{name}: no file has such a name")
        found.update(dict.fromkeys(inside))
    return list(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
