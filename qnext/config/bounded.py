"""Small files of a model folder, read only when they are small."""

from __future__ import annotations

from pathlib import Path

from qnext.errors import ConfigError

MAX_BYTES = 64 << 20


def read_bounded(path: Path, *, most: int = MAX_BYTES) -> bytes:
    """The content of a file. Raises ConfigError for one of more bytes than any such file has, OSError."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ConfigError(f"{path}: larger than {most >> 20} MiB")
    return content
