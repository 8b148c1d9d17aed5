"""Reads small files of a model folder, with a limit of their size, and JSON in which no key may appear twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qnext.errors import ConfigError

MAX_BYTES = 64 << 20


def read_bounded(path: Path, *, most: int = MAX_BYTES) -> bytes:
    """The content of a file. Raises OSError, and ConfigError for a file that is larger than any such file."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ConfigError(f"{path}: larger than {most >> 20} MiB")
    return content


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The first key of a JSON object that appears twice, for an `object_pairs_hook`."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None
