"""JSON schemas as people write them, and the part of each that a grammar can hold. Neither torch nor a library.

Annotations say nothing about the form of an output and are left out. What a grammar cannot hold is relaxed: the
output may be more than the schema allows, and keeps to all the rest of it. With `is_strict` it is refused instead.
A null stands for an absent keyword.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from qnext.engine.sampling.overlaps import exclude
from qnext.engine.sampling.patterns import held_pattern
from qnext.engine.sampling.schema_keywords import (
    ANY_TYPE,
    COUNTS,
    DATA,
    DEFINITIONS,
    FORMATS,
    LISTED,
    NAMED,
    NUMBERS,
    OTHER_NAMES,
    RELAXED,
    SINGLE,
    TYPES,
    is_neutral,
)
from qnext.errors import UsageError

_NAME = re.compile(r"[\w$-]{1,40}", re.ASCII)
_MAX_REFERENCES = 32  # followed in a row
_MAX_BRANCHES = 64  # of a oneOf of which every two are compared
_LARGEST = 2**62  # of a bound, and the least step between numbers, that an expression of digits is made of
_LEAST_STEP = 1e-6
_MOST_REMAINDERS = 20_000  # of a multipleOf, zeros at its end left out: what compiles it looks at each of them


@dataclass
class Enforceable:
    """A schema that a grammar can hold. `relaxed`: the places of what it leaves out, such as "properties.a.not"."""

    schema: dict[str, Any]
    relaxed: list[str] = field(default_factory=list)


def enforceable(schema: Mapping[str, Any], *, is_strict: bool = False) -> Enforceable:
    """Raises UsageError that names the place and the keyword: for what has no meaning, and in a strict schema for
    what cannot be enforced. The schema is nested no deeper than a recursion allows."""
    reading = _Reading(schema, is_strict)
    found = reading.read(schema, ())
    assert isinstance(found, dict)
    if reading.moved:
        found["$defs"] = reading.moved
    return Enforceable(found, list(dict.fromkeys(reading.relaxed)))


def without_nulls(schema: Any) -> Any:
    """The schema as it was written, without keywords that are null. An empty list of properties is an empty object."""
    if isinstance(schema, list):
        return [without_nulls(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None and (key not in DATA or key == "enum"):
            continue
        if key in (*NAMED, *DEFINITIONS) and isinstance(value, Mapping):
            kept[key] = {name: {} if entry is None else without_nulls(entry) for name, entry in value.items()}
        elif key in (*NAMED, *DEFINITIONS) and value == []:
            kept[key] = {}
        else:
            kept[key] = value if key in DATA else without_nulls(value)
    return kept


class _Reading:
    def __init__(self, root: Mapping[str, Any], is_strict: bool) -> None:
        self.root = root
        self.is_strict = is_strict
        self.relaxed: list[str] = []
        self.moved: dict[str, Any] = {}  # targets of references
        self._names: dict[str, str] = {}  # pointer to name of it
        identifier = root.get("$id", root.get("id"))
        self._base = identifier.split("#")[0] if isinstance(identifier, str) else ""

    def read(self, node: Any, path: tuple[str, ...]) -> dict[str, Any] | bool:
        if node is None:
            return True
        if isinstance(node, bool):
            return node
        if not isinstance(node, Mapping):
            raise _malformed(path, "a schema must be an object")
        found: dict[str, Any] = {}
        for key, value in node.items():
            if value is None and key not in ("const", "default"):
                continue
            if key == "x-guidance":
                raise UsageError("json_schema: x-guidance is not supported")
            reader = _READERS.get(key)
            if reader is not None:
                reader(self, key, value, (*path, key), found)
            elif key in RELAXED and not is_neutral(node, key, value):
                self.relax((*path, key))
        self._adjust(node, found, path)
        return found

    def relax(self, path: tuple[str, ...]) -> None:
        if self.is_strict:
            raise UsageError(f"json_schema: {_place(path)} cannot be enforced, as strict asks")
        self.relaxed.append(_place(path))

    # ---- keywords ----

    def _named(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if value == []:
            value = {}
        if not isinstance(value, Mapping):
            raise _malformed(path, "must be an object")
        found[key] = {}
        for name, entry in value.items():
            kept = held_pattern(name) if key == "patternProperties" else name
            if kept is None:
                self.relax(path)
            else:
                found[key][kept] = self.read(entry, (*path, name))

    def _listed(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if not isinstance(value, list):
            raise _malformed(path, "must be a list")
        entries = [self.read(entry, (*path, str(index))) for index, entry in enumerate(value)]
        if not entries:
            return
        if key == "oneOf" and not self._are_disjoint(value):
            self.relax(path)
        found[key] = entries

    def _single(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if key == "items" and isinstance(value, list):  # as drafts before 2020-12 write a tuple
            self._listed("prefixItems", value, path, found)
        else:
            found[key] = self.read(value, path)

    def _type(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        names = value if isinstance(value, list) else [value]
        kinds: list[str] = []
        for name in names:
            if name is None:
                name = "null"
            if not isinstance(name, str):
                raise _malformed(path, "must be a name or a list of names")
            lower = name.lower()
            kind = lower if lower in TYPES else OTHER_NAMES.get(lower)
            if kind is None:
                if lower not in ANY_TYPE:
                    raise _malformed(path, "is none of the types of JSON schemas")
                return
            if kind not in kinds:
                kinds.append(kind)
        if kinds:
            found[key] = kinds if isinstance(value, list) and len(kinds) > 1 else kinds[0]

    def _enum(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if not isinstance(value, list):
            raise _malformed(path, "must be a list")
        if value:
            found[key] = value

    def _const(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        found[key] = value

    def _required(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if isinstance(value, bool):  # of the property itself, as draft 3 has it
            self.relax(path)
            return
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise _malformed(path, "must be a list of names")
        found[key] = list(dict.fromkeys(value))

    def _pattern(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if not isinstance(value, str):
            raise _malformed(path, "must be a regular expression")
        held = held_pattern(value)
        if held is None:
            self.relax(path)
        else:
            found[key] = held

    def _format(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if value in FORMATS:
            found[key] = value

    def _count(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
            raise _malformed(path, "must be a whole number")
        if value > 0 or key.startswith("max"):
            found[key] = int(value)

    def _number(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if isinstance(value, bool) and key.startswith("exclusive"):
            return  # draft 4: see _adjust
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _malformed(path, "must be a number")
        if key == "multipleOf" and value <= 0:
            raise _malformed(path, "must be above zero")
        if key == "multipleOf" and _LEAST_STEP <= value <= _LARGEST and _significant(value) > _MOST_REMAINDERS:
            raise _malformed(path, f"is too costly above {_MOST_REMAINDERS}, zeros at the end and the point left out")
        if abs(value) > _LARGEST or (key == "multipleOf" and value < _LEAST_STEP):
            self.relax(path)
        else:
            found[key] = value

    def _ref(self, key: str, value: Any, path: tuple[str, ...], found: dict[str, Any]) -> None:
        if not isinstance(value, str):
            raise _malformed(path, "must be a reference")
        pointer = value.removeprefix(self._base) if self._base else value
        target = self._target(pointer)
        if target is None and pointer.startswith("#/"):
            raise _malformed(path, "points to nothing")
        if target is None:
            self.relax(path)
        elif pointer in ("", "#"):
            found[key] = "#"
        else:
            found[key] = f"#/$defs/{self._moved_name(pointer, target)}"

    def _moved_name(self, pointer: str, target: Any) -> str:
        """Where the target of a reference stands in the schema that is read: all are found in one place."""
        name = self._names.get(pointer)
        if name is None:
            name = self._names[pointer] = f"d{len(self._names)}"
            self.moved[name] = self.read(target, tuple(pointer[2:].split("/")))
        return name

    def _adjust(self, node: Mapping[str, Any], found: dict[str, Any], path: tuple[str, ...]) -> None:
        """What several keywords say together."""
        for end in ("Minimum", "Maximum"):
            if node.get(f"exclusive{end}") is True and end.lower() in found:
                found[f"exclusive{end}"] = found.pop(end.lower())
        if "prefixItems" in found and "additionalItems" in found:
            found["items"] = found["additionalItems"]
        found.pop("additionalItems", None)
        optional = set(found.get("properties", ())) - set(found.get("required", ()))
        for key in ("minProperties", "maxProperties"):
            if key in found and optional:
                del found[key]
                self.relax((*path, key))
        if node.get("nullable") is True:
            _allow_null(found)

    # ---- references and what excludes what ----

    def _target(self, pointer: str) -> Any:
        """What a reference inside the schema points to; None for nothing, or for a place outside."""
        if pointer in ("", "#"):
            return self.root
        if not pointer.startswith("#/"):
            return None
        target: Any = self.root
        for part in pointer[2:].split("/"):
            part = part.replace("%24", "$").replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping):
                target = target.get(part)
            elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            else:
                return None
        return target if isinstance(target, (Mapping, bool)) else None

    def _resolved(self, node: Any) -> Any:
        for _ in range(_MAX_REFERENCES):
            reference = node.get("$ref") if isinstance(node, Mapping) else None
            if not isinstance(reference, str):
                return node
            node = self._target(reference)
        return None

    def _are_disjoint(self, nodes: Sequence[Any]) -> bool:
        """Whether no value fits two of the schemas, by their types, their values or a property that tells them."""
        if len(nodes) > _MAX_BRANCHES:
            return False
        resolved = [self._resolved(node) for node in nodes]
        return all(exclude(resolved[i], resolved[j]) for i in range(len(resolved)) for j in range(i + 1, len(resolved)))


_Reader = Callable[[_Reading, str, Any, "tuple[str, ...]", "dict[str, Any]"], None]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys(NAMED, _Reading._named),
    **dict.fromkeys(LISTED, _Reading._listed),
    **dict.fromkeys(SINGLE, _Reading._single),
    **dict.fromkeys(COUNTS, _Reading._count),
    **dict.fromkeys(NUMBERS, _Reading._number),
    "type": _Reading._type,
    "enum": _Reading._enum,
    "const": _Reading._const,
    "required": _Reading._required,
    "pattern": _Reading._pattern,
    "format": _Reading._format,
    "$ref": _Reading._ref,
}


def _allow_null(found: dict[str, Any]) -> None:
    """OpenAPI's `nullable`."""
    kinds = found.get("type")
    if kinds is None or any(key in found for key in ("anyOf", "oneOf", "allOf", "$ref")):
        inner = dict(found)
        found.clear()
        found["anyOf"] = [inner, {"type": "null"}]
        return
    found["type"] = list(dict.fromkeys([*(kinds if isinstance(kinds, list) else [kinds]), "null"]))
    values = [found.pop("const")] if "const" in found else found.get("enum")
    if values is not None:
        found["enum"] = values if None in values else [*values, None]


def _significant(value: int | float) -> int:
    """The digits of a number as one whole number: 25 for 2500, 2.5 and 0.0025."""
    digits = "".join(map(str, Decimal(repr(value)).as_tuple().digits)).rstrip("0")
    return int(digits or "0")


def _place(path: tuple[str, ...]) -> str:
    """A path for a reader; names that could be anything are left out."""
    return ".".join(part if _NAME.fullmatch(part) else "…" for part in path) or "the schema"


def _malformed(path: tuple[str, ...], what: str) -> UsageError:
    return UsageError(f"json_schema: {_place(path)}: {what}")
