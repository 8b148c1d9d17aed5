"""The hash of a file. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 20


def sha256_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """`report` gets the bytes of each block that was read."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
            if report is not None:
                report(len(block))
    return checksum.hexdigest()
