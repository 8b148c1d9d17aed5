"""JSON of documents with long lists, written in slices. No slice holds the interpreter's lock for long."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

_SLICE = 2_048  # values that are written at once: a millisecond or two
_PLAIN = 16_384  # of plain numbers


class LongList:
    """A list of `length` elements. `elements(i, j)` returns the elements from i to j. It is called in order.

    `width` is the approximate number of values in one element.
    """

    def __init__(
        self, length: int, elements: Callable[[int, int], Sequence[Any]], *, width: int = 1, at_once: int = _SLICE
    ) -> None:
        self._length = length
        self._elements = elements
        self._step = max(1, at_once // width)

    @classmethod
    def of_values(cls, values: Sequence[int]) -> LongList:
        return cls(len(values), lambda i, j: values[i:j], at_once=_PLAIN)

    @property
    def is_short(self) -> bool:
        return self._length <= self._step

    def whole(self) -> list[Any]:
        return list(self._elements(0, self._length))

    def parts(self) -> Iterator[bytes]:
        """The JSON of the list, in parts."""
        for begin in range(0, self._length, self._step):
            part = orjson.dumps(self._elements(begin, min(begin + self._step, self._length)))
            yield (b"," if begin else b"[") + part[1:-1]
        yield b"]" if self._length else b"[]"


def whole_json(document: Any) -> bytes:
    """The JSON of a document whose lists are short, at once."""
    return orjson.dumps(document, default=_listed)


def json_parts(document: Any) -> bytes | Iterator[bytes]:
    """The JSON of a document: bytes, or an iterator that makes one part after another where the document holds a long
    list."""
    mark = secrets.token_hex(16)
    found: list[LongList] = []

    def default(value: Any) -> Any:
        if not isinstance(value, LongList) or value.is_short:
            return _listed(value)
        found.append(value)
        return f"{mark}{len(found) - 1}"

    skeleton = orjson.dumps(document, default=default)
    return _filled(re.split(f'"{mark}(\\d+)"'.encode(), skeleton), found) if found else skeleton


def _filled(pieces: list[bytes], lists: Sequence[LongList]) -> Iterator[bytes]:
    for place, piece in enumerate(pieces):
        if place % 2:
            yield from lists[int(piece)].parts()
        else:
            yield piece


def _listed(value: Any) -> Any:
    if isinstance(value, LongList):
        return value.whole()
    raise TypeError(f"no JSON of {type(value).__name__}")
