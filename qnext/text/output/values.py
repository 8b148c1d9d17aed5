"""Bare text of an argument to JSON, by what the tool's schema allows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.text.output.json_values import strict_json
from qnext.text.output.scan import WHITE_SPACE

_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_MAX_REFERENCES = 16  # one after another
_TYPES_OF_PYTHON = {
    bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", dict: "object", list: "array"
}  # fmt: skip
# Keywords that say something about values of one type alone, where a schema has no type.
_TYPES_OF_KEYWORDS = {
    "properties": "object", "additionalProperties": "object", "patternProperties": "object", "required": "object",
    "items": "array", "prefixItems": "array",
}  # fmt: skip
_BRANCHES = ("anyOf", "oneOf", "allOf")

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
                return types_of(others, root) if isinstance(others, Mapping) else STRING
            self._found[key] = types_of(schema, root)
        return self._found[key]


def named_parameters(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name of a tool and the schema of its parameters."""
    function: Mapping[str, Any] = tool.get("function", tool)
    parameters = function.get("parameters")
    return function["name"], parameters if isinstance(parameters, Mapping) else {}


def types_of(schema: Any, root: Mapping[str, Any]) -> Types:
    """All types that some branch of the schema allows; references are looked up in `root`."""
    types: set[str] = set()
    seen: set[int] = set()
    waiting = [schema]
    while waiting:
        value = resolved(waiting.pop(), root)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        if value.get("nullable") is True:
            types.add("null")
        found = _own_types(value)
        types.update(found)
        if not found:
            for key in _BRANCHES:
                waiting.extend(value[key] if isinstance(value.get(key), list) else ())
    return frozenset(types) if types != {"null"} or _is_null(schema) else frozenset()


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("nullable") is not True


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    """Types that a schema itself allows, without its branches."""
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {name for name in named if isinstance(name, str)}
    if isinstance(schema.get("enum"), list):
        return {_TYPES_OF_PYTHON[type(entry)] for entry in schema["enum"]}
    if "const" in schema:
        return {_TYPES_OF_PYTHON[type(schema["const"])]}
    if any(isinstance(schema.get(key), list) for key in _BRANCHES):
        return set()
    return {kind for key, kind in _TYPES_OF_KEYWORDS.items() if key in schema}


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

    Without types it is the JSON that it parses as. None where a list or an object is wanted and has begun, but broken.

    >>> json_of_value("3", frozenset({"integer", "string"})), json_of_value("True", frozenset({"boolean"}))
    ('3', 'true')
    """
    word = text.strip(WHITE_SPACE)
    if not types:
        found = strict_json(word, '{["') or (word if word in ("true", "false", "null") else None)
        return found or (word if _NUMBER.fullmatch(word) else _string(text))
    if "null" in types and word in ("null", "None"):
        return "null"
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower()
    if "integer" in types and (integer := _INTEGER.fullmatch(word)):
        return integer.group(1)
    if "number" in types and _NUMBER.fullmatch(word):
        return word
    brackets = "{" * ("object" in types) + "[(" * ("array" in types)
    if brackets and (found := strict_json(word, brackets)) is not None:
        return found
    if brackets and "string" not in types and (inner := strict_json(word, '"')) is not None:
        found = strict_json(json.loads(inner), brackets)  # a model may write the object as a text that holds it
        if found is not None:
            return found
    if brackets and "string" not in types and any(mark in word for mark in '{}[]"'):
        return strict_json(word)
    return _string(text)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
