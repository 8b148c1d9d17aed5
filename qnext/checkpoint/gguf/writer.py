"""Writing the GGUF container: header first, then the tensors as they come. No torch."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qnext import files
from qnext.checkpoint.gguf.container import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    MAGIC,
    SCALARS,
    STRING,
    UINT32,
    GgufSpec,
    Value,
)
from qnext.errors import UsageError

_VERSION = 3


class GgufWriter:
    """Writes the tensors that `specs` announces, each once and in that order. It keeps none in memory."""

    def __init__(self, file: files.NewFile, keys: Mapping[str, Value], specs: Mapping[str, GgufSpec]) -> None:
        self._file = file
        self._waiting = iter(specs.items())
        header = [MAGIC, struct.pack("<IQQ", _VERSION, len(specs), len(keys))]
        header += [piece for name, value in keys.items() for piece in (_text(name), _encode(name, value))]
        offset = 0
        for name, spec in specs.items():
            dims = tuple(reversed(spec.shape))
            header += [_text(name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
            header.append(struct.pack("<IQ", spec.block.number, offset))
            offset += spec.num_bytes + -spec.num_bytes % DEFAULT_ALIGNMENT
        self._write(b"".join(header))
        self._pad()

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write the bytes of the next tensor, in pieces that together have the announced size."""
        expected, spec = next(self._waiting)
        assert name == expected, (name, expected)
        before = self._file.tell()
        for piece in pieces:
            self._write(piece)
        assert self._file.tell() - before == spec.num_bytes, name
        self._pad()

    def finish(self) -> None:
        assert next(self._waiting, None) is None

    def _write(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % DEFAULT_ALIGNMENT))


@contextmanager
def new_file(path: str | Path) -> Iterator[files.NewFile]:
    """The same as files.new_file, and makes the folder. Raises UsageError for a file that exists."""
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target}: exists")
    with files.new_file(path, with_parents=True) as file:
        yield file


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encode(name: str, value: Value) -> bytes:
    if isinstance(value, list):
        # llama.cpp takes the token types as int32 only; every other list of numbers here is of truth values.
        kind = _kind(name, value[0]) if value else STRING
        kind = INT32 if kind == UINT32 else kind
        items = b"".join(_item(name, kind, item) for item in value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + items
    kind = _kind(name, value)
    return struct.pack("<I", kind) + _item(name, kind, value)


def _kind(name: str, value: Value) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return UINT32
    if isinstance(value, float):
        return FLOAT32
    assert isinstance(value, str), (name, value)
    return STRING


def _item(name: str, kind: int, value: Value) -> bytes:
    if isinstance(value, str):
        return _text(value)
    try:
        return struct.pack("<" + SCALARS[kind], value)
    except (struct.error, OverflowError):
        raise UsageError(f"{name}: {value} does not fit into a GGUF file") from None
