"""The GGUF container: keys, tensor descriptions and where the bytes lie. No torch.

A file is `GGUF`, version, counts, typed keys, tensor descriptions, and the tensors' bytes, each padded to the
alignment (ggml, docs/gguf.md). All numbers are little-endian. A file that is read may come from anyone: every count,
length and offset is checked against what is left of the file before anything is made of it.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from qnext.checkpoint.header import check_name
from qnext.errors import CorruptCheckpoint, UsageError

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
_READ_VERSIONS = (2, 3)
_MAX_ALIGNMENT = 1 << 16
_MAX_DIMS = 4
_MAX_HEADER_BYTES = 256 << 20
_MAX_ARRAY_ITEMS = 1 << 23  # of all arrays together; a vocabulary and its merges have some 300,000
_MAX_KEY_BYTES = 65_535
_SMALLEST_KEY, _SMALLEST_TENSOR = 14, 33  # bytes

Value: TypeAlias = "bool | int | float | str | list[bool] | list[int] | list[float] | list[str]"

# number of a value type -> struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10


class BlockType(NamedTuple):
    """How a row is stored: blocks of `num_items` numbers in `num_bytes` bytes; `number` stands for it in files."""

    name: str
    number: int
    num_items: int
    num_bytes: int


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("BF16", 30, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
    )
}
_BLOCK_OF_NUMBER = {block.number: block for block in BLOCK_TYPES.values()}


class GgufSpec(NamedTuple):
    """A tensor to be written. `shape` has the order of torch: rows last but one, inputs last."""

    block: BlockType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.block.num_items * self.block.num_bytes


class GgufTensor(NamedTuple):
    """A tensor of a file: bytes [start, end) counted from the file's beginning; `shape` as in GgufSpec."""

    name: str
    block: BlockType
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile(NamedTuple):
    """What a file says about itself."""

    path: Path
    keys: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_gguf(path: str | Path) -> GgufFile:
    """Keys and tensor descriptions of a GGUF file of version 2 or 3.

    Raises CorruptCheckpoint naming file and key or tensor for whatever contradicts the format or the file's size.
    """
    source = Path(path)
    with source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise CorruptCheckpoint(f"{source}: no GGUF file, only {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Reader(source, mapped).read()


class _Reader:
    """Walks through the header. `where` says in errors what was being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.end = min(len(data), _MAX_HEADER_BYTES)
        self.position = 0
        self.where = "header"
        self.items_left = _MAX_ARRAY_ITEMS

    def error(self, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path}: {self.where}: {problem}")

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.end - self.position:
            if self.end < len(self.data):
                raise self.error(f"the header is longer than {_MAX_HEADER_BYTES >> 20} MiB")
            raise self.error(f"truncated: needs {num_bytes} bytes, {self.end - self.position} are left")
        raw = self.data[self.position : self.position + num_bytes]
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
        magic = self.take(4)
        if magic != MAGIC:
            raise CorruptCheckpoint(f"{self.path}: no GGUF file, it begins with {magic!r}")
        version = self.number("I")
        if version not in _READ_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in _READ_VERSIONS else f"version {version}"
            raise self.error(f"{kind} is not supported, only little-endian of versions 2 and 3")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        left = len(self.data) - self.position
        if num_keys > left // _SMALLEST_KEY or num_tensors > left // _SMALLEST_TENSOR:
            raise self.error(f"{num_keys} keys and {num_tensors} tensors do not fit into {left} bytes")
        keys = self.read_keys(num_keys)
        alignment = self.check_keys(keys)
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
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.scalars(kind, 1)[0]

    def array(self, kind: int, count: int) -> Value:
        if kind == _ARRAY:
            raise self.error("arrays of arrays are not supported")
        smallest = 8 if kind == _STRING else self.item_size(kind)
        if count > (self.end - self.position) // smallest:
            raise self.error(f"an array of {count} items does not fit into what is left of the file")
        self.items_left -= count
        if self.items_left < 0:
            raise self.error(f"arrays of more than {_MAX_ARRAY_ITEMS} items in all")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        return self.scalars(kind, count)

    def item_size(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise self.error(f"unknown value type {kind}")
        return struct.calcsize("<" + _SCALARS[kind])

    def scalars(self, kind: int, count: int) -> list:
        raw = self.take(self.item_size(kind) * count)
        if kind == _BOOL and raw.strip(b"\0\1"):
            raise self.error("a truth value that is neither 0 nor 1")
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", raw))

    def check_keys(self, keys: Mapping[str, Value]) -> int:
        """Refuse one part of a split model; returns the alignment."""
        self.where = "key split.count"
        if keys.get("split.count", 1) not in (0, 1):
            raise self.error("this is one file of several; llama-gguf-split --merge makes them one")
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
        data_start = self.position + -self.position % alignment
        position = data_start
        tensors: dict[str, GgufTensor] = {}
        for name, (spec, offset) in described.items():
            self.where = f"tensor {name}"
            start = data_start + offset
            if start != position:
                fault = "is not aligned" if offset % alignment else "overlaps or leaves a hole"
                raise self.error(f"offset {offset} {fault}; the tensors before it end at {position - data_start}")
            end = start + spec.num_bytes
            if end > len(self.data):
                raise self.error(f"truncated: ends at byte {end} of {len(self.data)}")
            tensors[name] = GgufTensor(name, spec.block, spec.shape, start, end)
            position = end + -end % alignment
        if len(self.data) > max(position, data_start):
            raise CorruptCheckpoint(f"{self.path}: {len(self.data) - position} bytes after the last tensor")
        return tensors

    def describe(self) -> GgufSpec:
        num_dims = self.number("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"{num_dims} dimensions; between 1 and {_MAX_DIMS} are allowed")
        shape = tuple(reversed([self.number("Q") for _ in range(num_dims)]))
        number = self.number("I")
        if number not in _BLOCK_OF_NUMBER:
            raise self.error(f"type {number} is not supported; known are {', '.join(BLOCK_TYPES)}")
        spec = GgufSpec(_BLOCK_OF_NUMBER[number], shape)
        if not all(shape) or shape[-1] % spec.block.num_items:
            raise self.error(f"shape {list(shape)} does not fit type {spec.block.name}")
        if spec.num_bytes > len(self.data):
            raise self.error(f"shape {list(shape)} of {spec.block.name} is larger than the file")
        return spec


class GgufWriter:
    """Writes the tensors that `specs` announces, each once and in that order, none kept in memory."""

    def __init__(self, file: BinaryIO, keys: Mapping[str, Value], specs: Mapping[str, GgufSpec]) -> None:
        self._file = file
        self._waiting = iter(specs.items())
        header = [MAGIC, struct.pack("<IQQ", VERSION, len(specs), len(keys))]
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
        """The bytes of the next tensor, in pieces that add up to what was announced."""
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
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its name when the block ends well, and vanishes otherwise."""
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target}: exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.partial-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp hides the file from others; a model gets the mode that any new file has.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encode(name: str, value: Value) -> bytes:
    if isinstance(value, list):
        # llama.cpp takes the token types as int32 only; every other list of numbers here is of truth values.
        kind = _kind(name, value[0]) if value else _STRING
        kind = _INT32 if kind == _UINT32 else kind
        items = b"".join(_item(name, kind, item) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    kind = _kind(name, value)
    return struct.pack("<I", kind) + _item(name, kind, value)


def _kind(name: str, value: Value) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _UINT32
    if isinstance(value, float):
        return _FLOAT32
    assert isinstance(value, str), (name, value)
    return _STRING


def _item(name: str, kind: int, value: Value) -> bytes:
    if isinstance(value, str):
        return _text(value)
    try:
        return struct.pack("<" + _SCALARS[kind], value)
    except (struct.error, OverflowError):
        raise UsageError(f"{name}: {value} does not fit into a GGUF file") from None
