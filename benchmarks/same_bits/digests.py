"""Values as JSON in which every bit counts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Numbers, texts, lists and tables; floats by their bits, records by the names of their fields."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "tobytes"):  # of numpy
        return plain(value.item()) if value.ndim == 0 else bytes_digest(value.tobytes())
    raise TypeError(f"{type(value).__name__} has no plain form")


def bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def digest(value: Any) -> str:
    return bytes_digest(json.dumps(plain(value), sort_keys=True).encode())


def file_digest(path: Path) -> str:
    return bytes_digest(path.read_bytes())


def folder_digest(folder: Path) -> dict[str, str]:
    """Of every file, by its name."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
