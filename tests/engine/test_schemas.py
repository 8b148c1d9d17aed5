"""Schemas as clients and generators write them: what is relaxed, what is refused, and what still holds."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from qnext.engine.sampling.constraint import Constraint
from qnext.engine.sampling.patterns import held_pattern
from qnext.engine.sampling.schema_keywords import RELAXED
from qnext.engine.sampling.schemas import enforceable, without_nulls
from qnext.errors import UsageError
from tests.engine.grammar_ends import can_end
from tests.engine.grammars import compiler, encoded, sampled, state_of, text_of


def of(value: Any, name: str = "v") -> dict[str, Any]:
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


# Schema, and the part of it that holds where that is not the whole.
RELAXABLE: dict[str, tuple[Any, Any]] = {
    "uniqueItems": (
        {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 3},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    ),
    "not": ({"type": "integer", "not": {"const": 0}}, {"type": "integer"}),
    "propertyNames": (
        {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "null"}},
        {"type": "object", "additionalProperties": {"type": "null"}},
    ),
    "contains": (
        {"type": "array", "contains": {"const": 1}, "items": {"enum": [1, 2]}, "maxItems": 3},
        {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    ),
    "dependentRequired": (
        {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 2}},
            "dependentRequired": {"a": ["b"]},
            "additionalProperties": False,
        },
        {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "additionalProperties": False},
    ),
    "if": ({"enum": [1, 2], "if": {"const": 1}, "then": False}, {"enum": [1, 2]}),
    "unevaluatedProperties": (of({"const": 1}) | {"unevaluatedProperties": False}, of({"const": 1})),
    "pattern": ({"type": "string", "maxLength": 4, "pattern": "^(?!a)b"}, {"type": "string", "maxLength": 4}),
    "oneOf": ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, {"enum": [1, 2, 3]}),
    "minProperties": (
        {"type": "object", "properties": {"a": {"const": 1}}, "minProperties": 1, "additionalProperties": False},
        {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False},
    ),
    "$ref": ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, True),
    "required": (
        {"type": "object", "properties": {"a": {"const": 1, "required": True}}, "additionalProperties": False},
        {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False},
    ),
    "multipleOf": (
        {"type": "number", "multipleOf": 1e-9, "minimum": 0, "maximum": 1},
        {"type": "number", "minimum": 0, "maximum": 1},
    ),
    "minimum": ({"type": "integer", "minimum": -(2**70), "maximum": 3}, {"type": "integer", "maximum": 3}),
}


@pytest.mark.parametrize("keyword", RELAXABLE)
def test_what_cannot_be_enforced_is_relaxed_and_the_rest_holds(keyword: str) -> None:
    inner, held = RELAXABLE[keyword]
    for seed in range(3):
        text = text_of(sampled(state_of(Constraint("json_schema", of(inner))), seed=seed))
        jsonschema.validate(json.loads(text), of(held))
    assert any(place.split(".")[-1] == keyword for place in enforceable(of(inner)).relaxed)
    assert keyword in RELAXED


@pytest.mark.parametrize("keyword", RELAXABLE)
def test_a_strict_schema_is_refused_by_keyword_and_place(keyword: str) -> None:
    inner, _ = RELAXABLE[keyword]
    with pytest.raises(UsageError) as raised:
        compiler().compile(Constraint("json_schema", of(inner), is_strict=True))
    place = "properties.v.properties.a" if keyword == "required" else "properties.v"
    assert f"{place}.{keyword} cannot" in str(raised.value)


ANNOTATED: list[Any] = [
    {"type": "string", "format": "password"},
    {"type": "string", "format": "file-path", "title": "Path"},
    {"type": "string", "contentMediaType": "image/png", "examples": [None], "default": None},
    {"type": "boolean", "deprecated": True, "readOnly": True, "$comment": "x", "x-order": 3},
    {"type": "integer", "format": "int64", "description": "a number", "nullable": False},
    {
        "type": "object",
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://x.example/s.json",
        "discriminator": {"propertyName": "k"},
        "unevaluatedProperties": True,
        "propertyNames": {"type": "string"},
        "maxProperties": 1,
    },
]


@pytest.mark.parametrize("schema", ANNOTATED, ids=str)
def test_annotations_say_nothing(schema: Any) -> None:
    found = enforceable(of(schema), is_strict=True)
    assert not found.relaxed
    compiler().compile(Constraint("json_schema", of(schema), is_strict=True))


# What two ways to write the same thing allow is the same.
SAME: list[tuple[Any, Any]] = [
    ({"type": "object", "properties": None, "required": None, "additionalProperties": None}, {"type": "object"}),
    ({"type": "string", "enum": None, "pattern": None, "format": None}, {"type": "string"}),
    ({"type": "string", "enum": []}, {"type": "string"}),
    ({"type": "integer", "nullable": True}, {"type": ["integer", "null"]}),
    ({"type": "string", "enum": ["a"], "nullable": True}, {"enum": ["a", None]}),
    ({"nullable": True, "anyOf": [{"const": 1}]}, {"anyOf": [{"const": 1}, {"type": "null"}]}),
    ({"type": "number", "minimum": 1, "exclusiveMinimum": True}, {"type": "number", "exclusiveMinimum": 1}),
    ({"type": "number", "minimum": 1, "exclusiveMinimum": False}, {"type": "number", "minimum": 1}),
    (
        {"type": "array", "items": [{"const": 1}], "additionalItems": False},
        {"type": "array", "prefixItems": [{"const": 1}], "items": False},
    ),
    (
        {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}},
    ),
    ({"type": "object", "properties": [], "required": ["a", "a"]}, {"type": "object", "required": ["a"]}),
    ({"type": ["string", None]}, {"type": ["string", "null"]}),
    ({"type": "any"}, {}),
    ({"anyOf": [], "type": "null"}, {"type": "null"}),
]


@pytest.mark.parametrize(("written", "meant"), SAME, ids=str)
def test_other_ways_to_write_a_schema(written: Any, meant: Any) -> None:
    values = [None, 1, 1.5, 2, "", "a", "b", True, [], [1], [1, 2], {}, {"a": "x"}, {"a": 1}]

    def accepted(schema: Any) -> list[Any]:
        return [value for value in values if fits(schema, json.dumps(value))]

    assert accepted(written) == accepted(meant)
    assert accepted(written) == [v for v in values if jsonschema.Draft202012Validator(meant).is_valid(v)]


def fits(schema: Any, text: str) -> bool:
    state = state_of(Constraint("json_schema", schema))
    for token in encoded(text):
        if not state.allows(token):
            return False
        state.accept(token)
    return can_end(state)


def test_references_are_followed_wherever_they_point() -> None:
    schema = {
        "$id": "https://x.example/s",
        "type": "object",
        "properties": {
            "a": {"$ref": "#/components/schemas/Leaf"},
            "b": {"$ref": "#/properties/a"},
            "c": {"$ref": "https://x.example/s#/definitions/d~1e"},
            "d": {"$ref": "#"},
        },
        "additionalProperties": False,
        "definitions": {"d/e": {"type": "array", "items": {"$ref": "#/definitions/d~1e"}}},
        "components": {"schemas": {"Leaf": {"type": "integer"}}},
    }
    assert fits(schema, '{"a": 1, "b": 2, "c": [[], [[]]], "d": {"a": 3}}')
    assert not any(fits(schema, text) for text in ('{"a": "1"}', '{"b": "1"}', '{"c": [1]}', '{"d": {"a": []}}'))


FAULTS = [
    ({"type": "object", "properties": {"a": 5}}, "properties.a"),
    ({"type": "object", "properties": {"a": {"type": "stringg"}}}, "properties.a.type"),
    ({"type": "object", "required": "a"}, "required"),
    ({"items": {"minLength": "3"}}, "items.minLength"),
    ({"anyOf": [{"enum": "a"}]}, "anyOf.0.enum"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "properties.a.$ref"),
    ({"multipleOf": 0}, "multipleOf"),
]


@pytest.mark.parametrize(("schema", "place"), FAULTS, ids=str)
def test_what_means_nothing_is_named_by_its_place(schema: Any, place: str) -> None:
    with pytest.raises(UsageError) as raised:
        enforceable(schema)
    assert place in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^{{\w+}}$", ["{{a}}"], ["{a}", "{{}}"]),
        (r"^[[\]]+$", ["[]", "]"], ["a"]),
        (r"^[^]$", ["a", "é"], ["", "ab"]),
        (r"^a\/b$", ["a/b"], ["a\\/b"]),
        (r"^\d{3,}$|^x$", ["123", "x"], ["12"]),
        (r"b", ["abc", "b"], ["ac"]),
        (r"^(?:a|b)\{1\}$", ["a{1}"], ["a"]),
    ],
)
def test_patterns_mean_what_ecmascript_says(pattern: str, good: list[str], bad: list[str]) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert all(fits(schema, json.dumps(text, ensure_ascii=False)) for text in good)
    assert not any(fits(schema, json.dumps(text)) for text in bad)


@pytest.mark.parametrize(
    "pattern", [r"(?=a)", r"(?<!a)b", r"(a)\1", r"\bword\b", "a^b", "a$b", r"(?>a)", "[]", "[", "a\\", r"\cA"]
)
def test_patterns_that_no_grammar_holds(pattern: str) -> None:
    assert held_pattern(pattern) is None


def test_a_prompt_keeps_the_schema_but_for_nulls() -> None:
    schema = {
        "type": "object",
        "description": None,
        "required": None,
        "x-odd": [1],
        "properties": {"a": {"enum": [None, 1], "default": None, "const": None}, "required": None, "b": {"enum": None}},
    }
    assert without_nulls(schema) == {
        "type": "object",
        "x-odd": [1],
        "properties": {"a": {"enum": [None, 1], "default": None, "const": None}, "required": {}, "b": {}},
    }


def test_a_grammar_may_have_an_alternative() -> None:
    for constraint in (
        Constraint("json_object", alternative='start: "call" own\nown: "x"\n'),
        Constraint("choice", ("{}",), alternative='start: "callx"\n'),
        Constraint("lark", 'start: other\nother: "{}"', alternative='start: "callx"\n'),
        Constraint("regex", r"\{\}", alternative='start: "callx"\n'),
        Constraint("json_schema", {"const": {}}, alternative='start: "call" "x"\n'),
    ):
        for text in ("{}", "callx"):
            state = state_of(constraint)
            for token in encoded(text):
                state.accept(token)
            assert can_end(state), (constraint, text)
        assert not state_of(constraint).allows(encoded("a")[0])
