"""Bare text of an argument to JSON, by what the tool's schema allows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.text.output.json_values import strict_json
from qnext.text.output.scan import WHITE_SPACE

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LOOSE_NUMBER = re.compile(r"\+?(-?)(0|[1-9][0-9]*|(?=\.[0-9]))(?:\.([0-9]*))?([eE][+-]?[0-9]+)?")
_FENCED = re.compile(r"```[a-z]*\s*(.*?)\s*```", re.DOTALL)
_WORDS = ("true", "false", "null", "True", "False", "None")
_MAX_REFERENCES = 16  # one after another
_TYPES_OF_PYTHON = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
    dict: "object",
    list: "array",
}
# Keywords that say something about values of one type alone, where a schema has no type.
_TYPES_OF_KEYWORDS = {
    "properties": "object",
    "additionalProperties": "object",
    "patternProperties": "object",
    "required": "object",
    "items": "array",
    "prefixItems": "array",
}
_BRANCHES = ("anyOf", "oneOf", "allOf")
# Names of types, also as Python, Gemini and C write them; any other name means any type.
_TYPES_BY_WORD = {
    name: kind
    for kind, names in {
        "string": "string str text enum",
        "integer": "integer int int32 int64 long",
        "boolean": "boolean bool",
        "number": "number float double",
        "object": "object dict map",
        "array": "array list tuple arr",
        "null": "null none",
    }.items()
    for name in names.split()
}

Types = frozenset[str]  # names of JSON types; none at all means any
STRING: Types = frozenset({"string"})


class ToolTable:
    """The tools that an answer may call: their names, and what their arguments may be."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._parameters = dict(map(named_parameters, reversed(tools)))
        self._found: dict[tuple[str, str], Types] = {}

    def __contains__(self, function: str) -> bool:
        return function in self._parameters

    def arguments(self, function: str) -> Mapping[str, Any]:
        """Schemas of the arguments that a function names."""
        properties = self._parameters.get(function, {}).get("properties")
        return properties if isinstance(properties, Mapping) else {}

    def required(self, function: str) -> frozenset[str]:
        names = self._parameters.get(function, {}).get("required")
        return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()

    def types_of(self, function: str, argument: str) -> Types:
        """Types of an argument; that of one that no schema knows is text."""
        key = (function, argument)
        if key not in self._found:
            root = self._parameters.get(function, {})
            schema = self.arguments(function).get(argument)
            if not isinstance(schema, Mapping) and schema is not True:  # the names that a model makes up are not kept
                others = root.get("additionalProperties")
                return types_of(others, root) if isinstance(others, Mapping) or others is True else STRING
            self._found[key] = types_of(schema, root)
        return self._found[key]


def named_parameters(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name of a tool and the schema of its parameters."""
    function: Mapping[str, Any] = tool.get("function", tool)
    parameters = function.get("parameters")
    return function["name"], parameters if isinstance(parameters, Mapping) else {}


def types_of(schema: Any, root: Mapping[str, Any]) -> Types:
    """The types that the schema allows, none for any; references are looked up in `root`."""
    found = _Branches(root).types_of(schema, _MAX_REFERENCES)
    return frozenset() if found is None else found


class _Branches:
    """Types of a schema with branches, each looked at once. None means any type, and so does what is too deep."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._found: dict[int, Types | None] = {}
        self._open: set[int] = set()  # a branch that leads back to one of these says nothing new

    def types_of(self, schema: Any, depth: int) -> Types | None:
        value = resolved(schema, self._root)
        if not isinstance(value, Mapping) or not depth:
            return None
        if id(value) not in self._found:
            self._open.add(id(value))
            self._found[id(value)] = self._look(value, depth)
            self._open.discard(id(value))
        return self._found[id(value)]

    def _look(self, value: Mapping[str, Any], depth: int) -> Types | None:
        own = _own_types(value)
        if own is None:
            for key in ("anyOf", "oneOf"):
                inner = self._inner(value, key, depth)
                if inner and None not in inner:
                    own = _shared(own, frozenset[str]().union(*(types for types in inner if types is not None)))
            for types in self._inner(value, "allOf", depth):
                own = _shared(own, types)
        return own | {"null"} if own and value.get("nullable") is True else own

    def _inner(self, value: Mapping[str, Any], key: str, depth: int) -> list[Types | None]:
        branches = value.get(key)
        return [
            self.types_of(branch, depth - 1)
            for branch in (branches if isinstance(branches, list) else ())
            if branch is not False and id(resolved(branch, self._root)) not in self._open
        ]


def _shared(first: Types | None, second: Types | None) -> Types | None:
    """What both allow; an integer is a number."""
    if first is None or second is None:
        return second if first is None else first
    return frozenset(
        name
        for name in first | second
        if all(name in types or (name == "integer" and "number" in types) for types in (first, second))
    )


def _own_types(schema: Mapping[str, Any]) -> Types | None:
    """Types that a schema itself allows, without its branches."""
    named = schema.get("type")
    if isinstance(named, str):
        named = [named]
    if isinstance(named, list):
        known = {_TYPES_BY_WORD.get(name.lower()) for name in named if isinstance(name, str)}
        return None if None in known else frozenset(name for name in known if name)
    if isinstance(schema.get("enum"), list):
        return frozenset(_TYPES_OF_PYTHON[type(entry)] for entry in schema["enum"])
    if "const" in schema:
        return frozenset({_TYPES_OF_PYTHON[type(schema["const"])]})
    if any(isinstance(schema.get(key), list) for key in _BRANCHES):
        return None
    return frozenset(kind for key, kind in _TYPES_OF_KEYWORDS.items() if key in schema) or None


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a reference such as `#/$defs/Unit` stands for, None where nothing; any other schema as it is."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            return schema
        schema = root if reference.startswith("#") else None
        for part in reference.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
    return None


def json_of_value(text: str, types: Types) -> str | None:
    """JSON of the narrowest of `types` that the text can be, else of the text as a string.

    Without types it is the JSON or the literal of Python that it parses as. None where a list or an object is wanted
    and has begun, but broken.

    >>> json_of_value("3", frozenset({"integer", "string"})), json_of_value("True", frozenset({"boolean"}))
    ('3', 'true')
    """
    word = text.strip(WHITE_SPACE)
    if not types:
        found = strict_json(word, '{["') or (strict_json(word) if word in _WORDS else None)
        return found or (word if _NUMBER.fullmatch(word) else _string(text))
    if word in ("null", "None") and ("null" in types or "string" not in types):
        return "null"
    found = _scalar(word, types)
    if found is None and "string" not in types and (inner := strict_json(word, "\"'")) is not None:
        found = _scalar(json.loads(inner).strip(WHITE_SPACE), types)  # a model may put it in quotes
    if found is not None:
        return found
    brackets = "{" * ("object" in types) + "[(" * ("array" in types)
    if not brackets:
        return _string(text)
    found = strict_json(word, brackets)
    if found is None and "string" not in types:
        found = _unwrapped(word, brackets)
    if found is None and ("string" in types or not any(mark in word for mark in '{}[]"')):
        return _string(text)
    return found if found is not None else strict_json(word)


def _scalar(word: str, types: Types) -> str | None:
    """JSON of a number or a truth value."""
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower()
    if not types & {"integer", "number"} or (number := _LOOSE_NUMBER.fullmatch(word)) is None:
        return None
    sign, whole, fraction, exponent = number.groups("")
    if not (whole or fraction):
        return None
    if "integer" in types and not exponent and not fraction.strip("0"):
        return sign + (whole or "0")
    if "number" not in types:
        return None
    return sign + (whole or "0") + (f".{fraction}" if fraction else "") + exponent


def _unwrapped(word: str, brackets: str) -> str | None:
    """JSON of a list or object that a model writes inside a text, or between fences."""
    if fenced := _FENCED.fullmatch(word):
        return strict_json(fenced[1], brackets)
    inner = strict_json(word, '"')
    return strict_json(json.loads(inner), brackets) if inner is not None else None


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
