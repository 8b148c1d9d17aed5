"""TensorBoard's event files, written without TensorBoard: records with checksums, which hold protocol buffers."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qnext.files import append

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
_STRING = 7  # a data type of tensors
_START = 1  # of a session: TensorBoard drops what earlier files of the folder hold from its step on


class EventFile:
    """An event file of its own for each start of a run, in `folder`. Every write is one record more."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time_ns() // 1000:016d}.qnext.{os.getpid()}"
        self._has_begun = False

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str] | None = None) -> None:
        """Scalars and texts of one step. Raises OSError."""
        events = []
        if not self._has_begun:
            events += [_event(0, _field(3, b"brain.Event:2")), _event(step, _field(7, _number(1, _START)))]
        values = [_field(1, tag.encode()) + _float32(2, number) for tag, number in numbers.items()]
        values += [_text_value(tag, text) for tag, text in (texts or {}).items()]
        events.append(_event(step, _field(5, b"".join(_field(1, value) for value in values))))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            append(descriptor, b"".join(map(_record, events)), path=self._path)
        finally:
            os.close(descriptor)
        self._has_begun = True


def _event(step: int, content: bytes) -> bytes:
    wall_time = _key(1, _FIXED64) + struct.pack("<d", time.time())
    return wall_time + (_number(2, step) if step else b"") + content


def _text_value(tag: str, text: str) -> bytes:
    """A summary that the text plugin shows: a tensor of one string."""
    one = _field(2, _number(1, 1))
    tensor = _number(1, _STRING) + _field(2, one) + _field(8, text.encode())
    plugin = _field(1, _field(1, b"text"))
    return _field(1, tag.encode()) + _field(8, tensor) + _field(9, plugin)


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _number(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _float32(number: int, value: float) -> bytes:
    return _key(number, _FIXED32) + struct.pack("<f", min(max(value, -3e38), 3e38) if math.isfinite(value) else value)


def _field(number: int, content: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    assert value >= 0
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _masked(length) + event + _masked(event)


def _masked(data: bytes) -> bytes:
    """A CRC-32C, rotated and shifted as the format has it."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = checksum >> 8 ^ _TABLE[(checksum ^ byte) & 0xFF]
    checksum ^= 0xFFFFFFFF
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> Iterator[int]:
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        yield value


_TABLE = tuple(_table())
