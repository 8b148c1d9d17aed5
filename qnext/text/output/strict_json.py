"""JSON as a tool may rely on it: no key twice, no NaN, no lone surrogate, at most MAX_DEPTH levels."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from qnext.text.output.scan import MAX_DEPTH, JsonScanner, skip_space


def is_json_object(text: str) -> bool:
    """Whether the text is an object."""
    return text.startswith("{") and _is_strict(text)


def is_json_list(text: str) -> bool:
    """Whether the text is a list."""
    return text.startswith("[") and _is_strict(text)


def object_members(text: str) -> dict[str, tuple[Any, str]]:
    """Value and own text of each member of an object; a number's value is 0. Raises ValueError for anything else."""
    _check_levels(text)
    members: dict[str, tuple[Any, str]] = {}
    place = _after(text, 0, "{")
    while not text.startswith("}", place):
        if members:
            place = _after(text, place, ",")
        key, place = _DECODER.raw_decode(text, place)
        if not isinstance(key, str) or key in members:
            raise ValueError("a key is no string, or there twice")
        start = _after(text, place, ":")
        value, place = _DECODER.raw_decode(text, start)
        members[key] = (value, text[start:place])
        place = skip_space(text, place, len(text))
    if skip_space(text, place + 1, len(text)) != len(text):
        raise ValueError("text behind the object")
    _check_unicode(text, [*members, *(value for value, _ in members.values())])
    return members


def _is_strict(text: str) -> bool:
    try:
        _check_levels(text)
        _check_unicode(text, _DECODER.decode(text))
    except ValueError:
        return False
    return True


def _check_levels(text: str) -> None:
    """So that the decoder, which recurses, never goes deeper."""
    scanner = JsonScanner()
    scanner.feed(text, 0, len(text))
    if not scanner.is_done:
        raise ValueError(f"no whole object or list of at most {MAX_DEPTH} levels")


def _check_unicode(text: str, value: Any) -> None:
    """An escape can write half a character, which no UTF-8 answer can carry on. Raises ValueError."""
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def _after(text: str, place: int, mark: str) -> int:
    place = skip_space(text, place, len(text))
    if not text.startswith(mark, place):
        raise ValueError(f"no {mark} where one must be")
    return skip_space(text, place + 1, len(text))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _zero(_: str) -> int:
    return 0


# Numbers are not converted: that costs the square of their length, and nobody here reads them.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_zero, parse_float=_zero, parse_constant=_refuse)
