"""The keywords of JSON schemas: what a grammar holds of each, and what each holds. Neither torch nor a library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the grammar holds. `format` is held for FORMATS alone, `pattern` as far as patterns.held_pattern goes.
ENFORCED = (
    "type",
    "enum",
    "const",
    "anyOf",
    "allOf",
    "oneOf",
    "$ref",
    "nullable",
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "minProperties",
    "maxProperties",
    "items",
    "prefixItems",
    "additionalItems",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
)
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown")
# Keyword to what the output may then be. All other keywords are annotations.
RELAXED: Mapping[str, str] = {
    "uniqueItems": "items may repeat",
    "not": "what it excludes is possible",
    "propertyNames": "names are free",
    "contains": "no item need fit",
    "minContains": "no item need fit",
    "maxContains": "any number may fit",
    "dependentRequired": "each property stands alone",
    "dependentSchemas": "each property stands alone",
    "dependencies": "each property stands alone",
    "if": "neither then nor else holds",
    "unevaluatedProperties": "further properties are possible",
    "unevaluatedItems": "further items are possible",
    "$dynamicRef": "any value",
    "$recursiveRef": "any value",
    "oneOf": "read as anyOf where its schemas may overlap",
    "$ref": "any value, where it points outside of the schema",
    "pattern": "any text, with look-around, back references, or marks of word and line inside",
    "patternProperties": "such a pattern is passed over",
    "required": "passed over where it is true or false",
    "minProperties": "any number, where some of the named properties are optional",
    "maxProperties": "any number, where some of the named properties are optional",
    "minimum": "no bound beyond 2^62; the same for the other bounds",
    "multipleOf": "any number, for steps below 1e-6",
}

# Names of types that leave it open, those of JSON schemas, and what writers of Python, Protocol Buffers and OpenAPI
# write for these.
ANY_TYPE = ("any", "unknown")
TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
OTHER_NAMES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "dict": "object",
    "map": "object",
    "list": "array",
    "tuple": "array",
    "none": "null",
}

NAMED = ("properties", "patternProperties")  # hold schemas by name
DEFINITIONS = ("$defs", "definitions")  # and these where references find them
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "additionalItems")
DATA = ("const", "enum", "default", "example", "examples")  # hold values, in which a null is a value
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "minContains": (0,),
    "not": (False,),
}


def is_neutral(node: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether a relaxed keyword says nothing there."""
    if key == "if":
        return "then" not in node and "else" not in node
    if key in ("minContains", "maxContains") and "contains" not in node:
        return True
    return any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL.get(key, ()))
