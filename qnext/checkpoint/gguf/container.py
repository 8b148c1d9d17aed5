"""The GGUF container: keys, tensor descriptions, and where the bytes lie. No torch.

A file is `GGUF`, version, counts, typed keys, tensor descriptions, and the tensors' bytes, each padded to the alignment
(ggml, docs/gguf.md). All numbers are little-endian. A file may come from anyone. So every count, length and offset is
compared with the rest of the file before anything is made of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from qnext.checkpoint.gguf.block_types import BLOCK_OF_NUMBER, REFUSED_TYPES, BlockType
from qnext.checkpoint.header import check_name
from qnext.errors import CorruptCheckpoint, NotSupported, warn

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
READ_VERSIONS = (2, 3)
_MAX_ALIGNMENT = 1 << 16
_MAX_DIMS = 4
_MAX_HEADER_BYTES = 256 << 20
_MAX_ARRAY_ITEMS = 1 << 23  # of all arrays together; a vocabulary and its merges have some 300,000
_MAX_ARRAY_DEPTH = 4
_MAX_KEY_BYTES = 65_535
_MAX_FILE_BYTES = 1 << 62  # of what a header may announce
_SMALLEST_KEY, _SMALLEST_TENSOR, _SMALLEST_ARRAY = 14, 33, 12  # bytes

Value: TypeAlias = "bool | int | float | str | list[bool] | list[int] | list[float] | list[str] | list[list]"

# number of a value type -> struct code
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

# first bytes of files that are taken for GGUF -> what they are
_DAMAGED = {
    b"version https://git-lfs": "a git-lfs pointer; the file itself was not downloaded",
    b"<": "a page of HTML or XML, as a failed download leaves it",
    b"{": "JSON text, as a failed download leaves it",
    b"Entry not found": "the answer of a hub that has no such file",
    b"Invalid": "the text of a failed download",
    bytes(24): "zeros, as an interrupted download leaves them",
}
_OTHER_FORMATS = {
    b"lmgg": "a GGML file from before GGUF; llama.cpp's convert_llama_ggml_to_gguf.py reads some of them",
    b"fmgg": "a GGML file from before GGUF; llama.cpp's convert_llama_ggml_to_gguf.py reads some of them",
    b"tjgg": "a GGML file from before GGUF; llama.cpp's convert_llama_ggml_to_gguf.py reads some of them",
    b"PK\x03\x04": "a zip archive, as PyTorch writes its files",
    b"\x80\x02": "a Python pickle",
    b"\x1f\x8b": "a gzip archive; gunzip makes it a file again",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unzstd makes it a file again",
}


class GgufSpec(NamedTuple):
    """A tensor to be written. `shape` has torch's order: rows last but one, inputs last."""

    block: BlockType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.block.num_items * self.block.num_bytes


class GgufTensor(NamedTuple):
    """A tensor: bytes [start, end) of `path`, counted from the beginning of the file. `shape` as in GgufSpec."""

    name: str
    block: BlockType
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path


class GgufFile(NamedTuple):
    """What a file says about itself, or all parts of a split one together. `path` is that of the first part."""

    path: Path
    keys: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_part(path: str | Path) -> GgufFile:
    """Keys and tensor descriptions of one GGUF file of version 2 or 3, which may be a part of a split model.

    Raises CorruptCheckpoint, naming file and key or tensor, for everything that contradicts the format or the file's
    size, and NotSupported for other formats, versions and types of tensors.
    """
    source = Path(path)
    with source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        if head[:4] != MAGIC:
            raise _another_format(source, head, size)
        if size < 24:
            raise CorruptCheckpoint(f"{source}: truncated: no GGUF file has only {size} bytes")
        file.seek(0)
        return _HeaderReader(source, file, size).read()


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _another_format(path: Path, head: bytes, size: int) -> CorruptCheckpoint | NotSupported:
    """The error that says what a file without GGUF's first bytes is."""
    if size == 0:
        return CorruptCheckpoint(f"{path}: no GGUF file, it is empty")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, meaning in _DAMAGED.items():
        if text.startswith(start):
            return CorruptCheckpoint(f"{path}: no GGUF file but {meaning}")
    for start, meaning in _OTHER_FORMATS.items():
        if head.startswith(start):
            return NotSupported(f"{path}: no GGUF file but {meaning}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return NotSupported(
            f"{path}: no GGUF file but a safetensors file; a model of those is a folder with config.json"
        )
    return CorruptCheckpoint(f"{path}: no GGUF file, it begins with {head[:4]!r}")


class _HeaderReader:
    """Walks through the header. `where` says in errors what was being read."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.end = min(size, _MAX_HEADER_BYTES)
        self.position = 0
        self.where = "header"
        self.items_left = _MAX_ARRAY_ITEMS

    def error(self, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path}: {self.where}: {problem}")

    def unsupported(self, problem: str) -> NotSupported:
        return NotSupported(f"{self.path}: {self.where}: {problem}")

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.end - self.position:
            if self.end < self.size:
                raise self.error(f"the header is longer than {_MAX_HEADER_BYTES >> 20} MiB")
            raise self.error(
                f"truncated in its header: {self.position + num_bytes} bytes or more are expected, "
                f"the file has {self.size}"
            )
        raw = self.file.read(num_bytes)
        if len(raw) < num_bytes:
            raise self.error("truncated while its header was read")
        self.position += num_bytes
        return raw

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, *, limit: int | None = None) -> str:
        length = self.number("Q")
        if limit is not None and length > limit:
            raise self.error(f"a name of {length} bytes, at most {limit} are allowed")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("text that is not UTF-8") from None

    def read(self) -> GgufFile:
        self.take(len(MAGIC))
        version = self.number("I")
        if version not in READ_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in READ_VERSIONS else f"version {version}"
            raise self.unsupported(f"{kind} is not supported, only little-endian of versions 2 and 3")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        left = self.size - self.position
        if num_keys > left // _SMALLEST_KEY or num_tensors > left // _SMALLEST_TENSOR:
            raise self.error(f"{num_keys} keys and {num_tensors} tensors do not fit into {left} bytes")
        keys = self.read_keys(num_keys)
        alignment = self.alignment(keys)
        tensors = self.read_tensors(num_tensors, alignment)
        return GgufFile(self.path, keys, tensors)

    def read_keys(self, count: int) -> dict[str, Value]:
        keys: dict[str, Value] = {}
        for i in range(count):
            self.where = f"key number {i + 1}"
            name = self.text(limit=_MAX_KEY_BYTES)
            if not name or not name.isprintable():
                raise self.error(f"{name[:80]!r} is not the name of a key")
            self.where = f"key {name[:200]}"
            if name in keys:
                raise self.error("appears twice")
            keys[name] = self.value(self.number("I"))
        return keys

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.scalars(kind, 1)[0]

    def array(self, kind: int, count: int, *, depth: int = 1) -> list:
        if depth > _MAX_ARRAY_DEPTH:
            raise self.unsupported(f"arrays inside arrays are read {_MAX_ARRAY_DEPTH} deep")
        smallest = {STRING: 8, ARRAY: _SMALLEST_ARRAY}.get(kind) or self.item_size(kind)
        if count > (self.end - self.position) // smallest:
            raise self.error(f"an array of {count} items does not fit into what is left of the file")
        self.items_left -= count
        if self.items_left < 0:
            raise self.error(f"arrays of more than {_MAX_ARRAY_ITEMS} items in all")
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind == ARRAY:
            return [self.array(self.number("I"), self.number("Q"), depth=depth + 1) for _ in range(count)]
        return self.scalars(kind, count)

    def item_size(self, kind: int) -> int:
        if kind not in SCALARS:
            raise self.error(f"unknown value type {kind}")
        return struct.calcsize("<" + SCALARS[kind])

    def scalars(self, kind: int, count: int) -> list:
        raw = self.take(self.item_size(kind) * count)
        if kind == BOOL and raw.strip(b"\0\1"):
            raise self.error("a truth value that is neither 0 nor 1")
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", raw))

    def alignment(self, keys: Mapping[str, Value]) -> int:
        self.where = "key general.alignment"
        alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(f"must be a power of two up to {_MAX_ALIGNMENT}, not {str(alignment)[:40]}")
        return alignment

    def read_tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        described: dict[str, tuple[GgufSpec, int]] = {}
        for i in range(count):
            self.where = f"tensor number {i + 1}"
            name = self.text(limit=_MAX_KEY_BYTES)
            check_name(name, self.path)
            self.where = f"tensor {name}"
            if name in described:
                raise self.error("appears twice")
            described[name] = (self.describe(), self.number("Q"))
        return self.place(described, self.position + -self.position % alignment, alignment)

    def place(
        self, described: Mapping[str, tuple[GgufSpec, int]], data_start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors with their bytes: one after the other without holes, up to the end of the file."""
        position = data_start
        tensors: dict[str, GgufTensor] = {}
        for name, (spec, offset) in described.items():
            self.where = f"tensor {name}"
            start = data_start + offset
            if start != position:
                fault = "is not aligned" if offset % alignment else "overlaps or leaves a hole"
                raise self.error(f"offset {offset} {fault}; the tensors before it end at {position - data_start}")
            end = start + spec.num_bytes
            if end > _MAX_FILE_BYTES:
                raise self.error(f"shape {list(spec.shape)} of {spec.block.name} is larger than any file")
            tensors[name] = GgufTensor(name, spec.block, spec.shape, start, end, self.path)
            position = end + -end % alignment
        size = self.size
        expected = max((tensor.end for tensor in tensors.values()), default=0)
        if expected > size:
            cut = next(tensor.name for tensor in tensors.values() if tensor.end > size)
            raise CorruptCheckpoint(
                f"{self.path}: truncated: {size} of {expected} bytes, from tensor {cut} on; download it again"
            )
        if size > max(position, data_start):
            warn(f"{self.path}: {size - position} bytes after the last tensor are not read")
        return tensors

    def describe(self) -> GgufSpec:
        num_dims = self.number("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"{num_dims} dimensions; between 1 and {_MAX_DIMS} are allowed")
        shape = tuple(reversed([self.number("Q") for _ in range(num_dims)]))
        number = self.number("I")
        if number not in BLOCK_OF_NUMBER:
            meaning = REFUSED_TYPES.get(number, "unknown")
            raise self.unsupported(f"type {number} ({meaning}) is not supported")
        spec = GgufSpec(BLOCK_OF_NUMBER[number], shape)
        if not all(shape) or shape[-1] % spec.block.num_items:
            raise self.error(f"shape {list(shape)} does not fit type {spec.block.name}")
        return spec
