"""Refuses JSON in which an object has one key twice. No torch.

Parsers silently take one of the two values, and not all take the same one. So a proxy before the server could read
another request than the server does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel

from qnext.server.errors import ApiError

_PIECE = 1 << 20  # bytes that are looked at in one go: about a millisecond
_MAX_NAMED = 256 << 10  # bytes of a body in which the key is looked for
_QUOTE, _COLON = ord('"'), ord(":")


def check_keys(raw: bytes, value: Any, model: type[BaseModel]) -> None:
    """Raise ApiError 400 where an object of `raw` has one key twice. `value` is the parsed form of `raw`.

    The error names the key where it is a field of `model`, at any depth. Nothing else of the request is repeated. Every
    object is examined once, and every byte at most once.
    """
    num_keys = _num_keys(value)
    # One colon outside of texts for each member. With as many in all there is nothing to look for.
    if raw.count(b":") == num_keys or _num_members(raw) == num_keys:
        return
    key = _first_double(raw) if len(raw) <= _MAX_NAMED else None
    named = key if key in _field_names(model) else None
    what = "an object of the body has one key twice" if named is None else f"{named}: this key stands twice"
    raise ApiError.bad(what, param=named, code="invalid_json")


@cache
def _field_names(model: type[BaseModel]) -> frozenset[str]:
    def names(schema: Any) -> Iterator[str]:
        if isinstance(schema, dict):
            properties = schema.get("properties")
            yield from properties if isinstance(properties, dict) else ()
            for inner in schema.values():
                yield from names(inner)
        elif isinstance(schema, list):
            for inner in schema:
                yield from names(inner)

    return frozenset(names(model.model_json_schema(by_alias=True)))


def _num_keys(value: Any) -> int:
    count = 0
    waiting = [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict):
            count += len(container)
            container = container.values()
        waiting.extend(item for item in container if isinstance(item, (dict, list)))
    return count


def _num_members(raw: bytes) -> int:
    """Colons outside of texts, of valid JSON."""
    text = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    count, is_inside = 0, False
    for begin in range(0, len(text), _PIECE):
        piece = np.frombuffer(text, dtype=np.uint8, offset=begin, count=min(_PIECE, len(text) - begin))
        inside = np.logical_xor.accumulate(piece == _QUOTE)
        inside ^= is_inside
        count += int(((piece == _COLON) & ~inside).sum())
        is_inside = bool(inside[-1])
    return count


def _first_double(raw: bytes) -> str | None:
    """The key that stands twice in one object; of several the one whose object ends first."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        keys = [key for key, _ in pairs]
        if not found and len(set(keys)) < len(keys):
            found.append(next(key for n, key in enumerate(keys) if key in keys[:n]))

    try:
        json.loads(raw, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return None
    return found[0] if found else None
