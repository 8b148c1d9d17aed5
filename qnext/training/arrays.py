"""A file of arrays that checks itself and is mapped into memory: shards, references, a teacher's answers.

It is a magic word, the length of its head, the head (JSON, padded to 16 bytes: `facts`, and type and shape of every
array), the arrays, each padded to 16 bytes, and the CRC-32 of all that. It gets its name when it is whole.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qnext.errors import CorruptCheckpoint, warn
from qnext.files import write_file

_MAGIC, _ALIGNMENT = b"qnarray1", 16


class ArrayFile:
    """Raises CorruptCheckpoint naming the file where it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        try:
            data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CorruptCheckpoint(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        if len(data) < _ALIGNMENT or zlib.crc32(data[:-4].data) != int.from_bytes(data[-4:].tobytes(), "little"):
            raise CorruptCheckpoint(f"{path}: content differs from what was written (CRC-32)")
        assert data[:8].tobytes() == _MAGIC, path
        place = 12 + int.from_bytes(data[8:12].tobytes(), "little")
        head = json.loads(data[12:place].tobytes())
        self.path = path
        self.facts: dict[str, Any] = head["facts"]
        self.arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in head["arrays"].items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            self.arrays[name] = data[place : place + size].view(dtype).reshape(shape)
            place += size + -size % _ALIGNMENT


def write_arrays(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Publish a file at `path`. Raises OSError and DiskFull."""
    shapes = {name: (array.dtype.newbyteorder("<").str, array.shape) for name, array in arrays.items()}
    head = json.dumps({"facts": facts, "arrays": shapes}).encode()
    head += b" " * (-(12 + len(head)) % _ALIGNMENT)
    parts = [_MAGIC, struct.pack("<I", len(head)), head]
    for array in arrays.values():
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        parts += [data, bytes(-len(data) % _ALIGNMENT)]
    whole = b"".join(parts)
    write_file(path, whole + struct.pack("<I", zlib.crc32(whole)))


def is_damaged(path: Path) -> bool:
    """Whether a file that exists is no sound one."""
    try:
        ArrayFile(path)
    except CorruptCheckpoint:
        return os.path.lexists(path)
    return False


def sound_file(path: Path, facts: Mapping[str, Any]) -> ArrayFile | None:
    """The file at `path` if it is sound and has these facts. One that is damaged is told, as it is made again."""
    if is_damaged(path):
        warn(f"{path}: damaged; it is made again", error=CorruptCheckpoint)
        return None
    file = ArrayFile(path) if path.is_file() else None
    return file if file is not None and file.facts == facts else None
