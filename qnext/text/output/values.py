"""Bare text of an argument to JSON, by the types that the tool's schema allows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.text.output.scan import WHITE_SPACE
from qnext.text.output.strict_json import is_json_list, is_json_object

_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_MAX_REFERENCES = 16  # one after another
_TYPES_OF_PYTHON = {
    bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", dict: "object", list: "array"
}  # fmt: skip


class ArgumentTypes:
    """What types the arguments of some tools may have, by the tools' JSON schemas."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._parameters = dict(map(named_parameters, reversed(tools)))
        self._found: dict[tuple[str, str], frozenset[str]] = {}

    def of(self, function: str, argument: str) -> frozenset[str]:
        """Names of JSON types; empty where the schema says nothing."""
        key = (function, argument)
        if key not in self._found:
            root = self._parameters.get(function, {})
            properties = root.get("properties")
            schema = properties.get(argument) if isinstance(properties, Mapping) else None
            if schema is None:
                return frozenset()  # the names that a model makes up are not kept
            self._found[key] = types_of(schema, root)
        return self._found[key]


def named_parameters(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name of a tool and the schema of its parameters."""
    function: Mapping[str, Any] = tool.get("function", tool)
    parameters = function.get("parameters")
    return function["name"], parameters if isinstance(parameters, Mapping) else {}


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """All types that some branch of the schema allows; references are looked up in `root`."""
    types: set[str] = set()
    seen: set[int] = set()
    waiting = [schema]
    while waiting:
        value = resolved(waiting.pop(), root)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        named = value.get("type")
        if isinstance(named, str):
            types.add(named)
        elif isinstance(named, list):
            types.update(name for name in named if isinstance(name, str))
        elif isinstance(value.get("enum"), list):
            types.update(_TYPES_OF_PYTHON[type(entry)] for entry in value["enum"])
        elif "const" in value:
            types.add(_TYPES_OF_PYTHON[type(value["const"])])
        elif "properties" in value:
            types.add("object")
        elif "items" in value:
            types.add("array")
        else:
            for key in ("anyOf", "oneOf", "allOf"):
                waiting.extend(value[key] if isinstance(value.get(key), list) else ())
    return frozenset(types)


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


def json_of_value(text: str, types: frozenset[str]) -> str:
    """JSON of the narrowest of `types` that the text can be, else of the text as a string.

    >>> json_of_value("3", frozenset({"integer", "string"})), json_of_value("True", frozenset({"boolean"}))
    ('3', 'true')
    """
    word = text.strip(WHITE_SPACE)
    if "null" in types and word in ("null", "None"):
        return "null"
    if "boolean" in types and word in ("true", "false", "True", "False"):
        return word.lower()
    if "integer" in types and (integer := _INTEGER.fullmatch(word)):
        return integer.group(1)
    if "number" in types and _NUMBER.fullmatch(word):
        return word
    if ("object" in types and is_json_object(word)) or ("array" in types and is_json_list(word)):
        return word
    return json.dumps(text, ensure_ascii=False)
