"""One entry of the disk store as bytes: of which tokens it is, and its tensors.

A prefix of 32 bytes (magic, version, bytes and CRC of the header, CRC and bytes of the body), a JSON header, and the
body: the tokens as int32, then the tensors in the header's order, each at a multiple of 64, zeros between them. Every
byte of the file is under one of the two CRCs or compared with what it must be. CRC-32 and no keyed hash: the folder is
private, so what has to be noticed is damage, and whoever can write into it can also write into the process. No offset
is stored, hence none can be wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import zlib
from array import array
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

MAGIC = b"QNXCACHE"
VERSION = 2
PREFIX = struct.Struct("<8sIIIIQ")
DIGEST_BYTES = 20
MAX_HEADER_BYTES = 1 << 24
TOKEN_BYTES = 4
_ALIGNMENT = 64
_PIECE_BYTES = 1 << 19  # of one read, so that the CRC finds it in a cache of the CPU

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
_WHOLE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOAT_DTYPES, *_WHOLE_DTYPES)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedEntry(Exception):
    """The file is no whole entry of this store; the text says why."""


class EntryTensor(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What an entry says about itself. `owner` is a digest of whose it is. `body_crc` is None until the body was
    seen."""

    kind: str
    salt: bytes
    owner: bytes
    num_tokens: int
    specs: tuple[EntryTensor, ...]
    body_crc: int | None = None

    @property
    def body_bytes(self) -> int:
        return self._offsets()[-1]

    def tokens(self, body_B: Tensor) -> bytes:
        return body_B[: self.num_tokens * TOKEN_BYTES].numpy().tobytes()

    def tensors(self, body_B: Tensor) -> dict[str, Tensor]:
        """Views of the body."""
        return {
            spec.name: body_B[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for spec, start in zip(self.specs, self._offsets(), strict=False)
        }

    def _offsets(self) -> list[int]:
        """Where each tensor begins, and where the body ends."""
        offsets = [_aligned(self.num_tokens * TOKEN_BYTES)]
        for spec in self.specs:
            offsets.append(_aligned(offsets[-1] + spec.num_bytes))
        return offsets


class PrefixHasher:
    """Names for the prefixes of a sequence of tokens, within one kind and salt of one model."""

    def __init__(self, fingerprint: bytes, kind: str, salt: bytes) -> None:
        self._state = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in (fingerprint, kind.encode(), salt):
            self._state.update(len(part).to_bytes(8, "little") + part)

    def names(self, tokens: bytes, lengths: Iterable[int]) -> Iterator[tuple[int, str]]:
        """(length, name) for ascending lengths; reads every token once, however many lengths there are."""
        state, done = self._state.copy(), 0
        whole = memoryview(tokens)
        for length in lengths:
            state.update(whole[done * TOKEN_BYTES : length * TOKEN_BYTES])
            done = length
            yield length, state.copy().hexdigest()

    def name(self, tokens: bytes) -> str:
        return next(self.names(tokens, [len(tokens) // TOKEN_BYTES]))[1]


class Lengths:
    """The different lengths among some entries."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._sorted: list[int] = []

    def add(self, length: int) -> None:
        if not self._counts[length]:
            insort(self._sorted, length)
        self._counts[length] += 1

    def remove(self, length: int) -> bool:
        """Says whether none is left."""
        self._counts[length] -= 1
        if not self._counts[length]:
            del self._counts[length]
            self._sorted.remove(length)
        return not self._sorted

    def up_to(self, limit: int) -> list[int]:
        return self._sorted[: bisect_right(self._sorted, limit)]


def token_bytes(tokens: Sequence[int]) -> bytes:
    """The tokens as int32."""
    return array("i", tokens).tobytes()


def make_fingerprint(weights: bytes, **facts: str | int) -> bytes:
    """One value for everything that an entry's bits depend on.

    `weights` says which model it is. The facts are the rest: package version, dtypes, block size, backend and
    instruction set (two CPUs may round differently, and a cache shall not change an answer).
    """
    text = json.dumps([weights.hex(), sys.byteorder, sorted(facts.items())])
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def make_header(
    kind: str, salt: bytes, num_tokens: int, tensors: Mapping[str, Tensor], *, owner: bytes = b""
) -> Header:
    specs = (EntryTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    return Header(kind, salt, owner, num_tokens, tuple(specs))


def encode_header(header: Header, fingerprint: bytes) -> bytes:
    fields = {
        "fingerprint": fingerprint.hex(),
        "kind": header.kind,
        "salt": header.salt.hex(),
        "owner": header.owner.hex(),
        "num_tokens": header.num_tokens,
        "tensors": [[spec.name, _DTYPE_NAMES[spec.dtype], spec.shape] for spec in header.specs],
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def encode_body(header: Header, tokens: bytes, tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy of tokens and tensors as one run of bytes."""
    body_B = torch.empty(header.body_bytes, dtype=torch.uint8)
    end = len(tokens)
    body_B[:end].numpy().data[:] = tokens
    for spec, part in zip(header.specs, header.tensors(body_B).values(), strict=True):
        start = _aligned(end)
        body_B[end:start] = 0
        part.copy_(tensors[spec.name].detach())
        end = start + spec.num_bytes
    body_B[end:] = 0
    return body_B


def prefix_of(header_bytes: bytes, body_B: Tensor) -> bytes:
    body_crc = zlib.crc32(body_B.numpy().data)
    return PREFIX.pack(MAGIC, VERSION, len(header_bytes), zlib.crc32(header_bytes), body_crc, body_B.numel())


def read_header(file: BinaryIO, fingerprint: bytes) -> Header:
    """The header of a file that is open at its beginning; leaves it at the body. Raises DamagedEntry, OSError."""
    prefix = file.read(PREFIX.size)
    if len(prefix) != PREFIX.size:
        raise DamagedEntry("shorter than its prefix")
    magic, version, header_bytes, header_crc, body_crc, body_bytes = PREFIX.unpack(prefix)
    if magic != MAGIC or version != VERSION:
        raise DamagedEntry("another format")
    if header_bytes > MAX_HEADER_BYTES or os.fstat(file.fileno()).st_size != PREFIX.size + header_bytes + body_bytes:
        raise DamagedEntry("another size than the prefix says")
    text = file.read(header_bytes)
    if len(text) != header_bytes or zlib.crc32(text) != header_crc:
        raise DamagedEntry("header's checksum")
    header = _parse_header(text, fingerprint)._replace(body_crc=body_crc)
    if header.body_bytes != body_bytes:
        raise DamagedEntry("header and body do not fit each other")
    return header


def read_body(file: BinaryIO, header: Header) -> Tensor:
    """The body after its header, verified. Raises DamagedEntry, OSError."""
    body_B = torch.empty(header.body_bytes, dtype=torch.uint8)
    waiting, crc = body_B.numpy().data, 0
    while waiting.nbytes:
        # Not mapped: a map ends the process when the file is cut, and may change after it was verified.
        count = file.readinto(waiting[:_PIECE_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise DamagedEntry("shorter than before")
        crc = zlib.crc32(waiting[:count], crc)
        waiting = waiting[count:]
    if crc != header.body_crc:
        raise DamagedEntry("body's checksum")
    return body_B


def _parse_header(text: bytes, fingerprint: bytes) -> Header:
    try:
        fields = json.loads(text)
        if fields["fingerprint"] != fingerprint.hex():
            raise DamagedEntry("of another model or format")
        specs = tuple(EntryTensor(str(name), DTYPES[dtype], tuple(shape)) for name, dtype, shape in fields["tensors"])
        salt, owner = bytes.fromhex(fields["salt"]), bytes.fromhex(fields["owner"])
        header = Header(fields["kind"], salt, owner, fields["num_tokens"], specs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedEntry("header cannot be read") from error
    sizes = [header.num_tokens, *(size for spec in specs for size in spec.shape)]
    if not is_kind(header.kind) or any(type(size) is not int or size < 0 for size in sizes):
        raise DamagedEntry("header has values of other types")
    return header


def is_kind(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier()


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
