"""Hostile tools, schemas and grammars."""

from __future__ import annotations

from typing import Any

from tests.server.hostile.cases import FINE_OR_BAD, Case
from tests.server.hostile.surfaces import MARK


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _tools(*parameters: Any, choice: Any = "required") -> dict[str, Any]:
    return {"tools": [tool(p, f"f{i}") for i, p in enumerate(parameters)], "tool_choice": choice}


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _deep(key: str, depth: int, width: int = 1, bottom: Any = None) -> Any:
    """A schema with `width` like ones under `key` at each level."""
    schema: Any = {"type": "string"} if bottom is None else bottom
    for _ in range(depth):
        if key == "properties":
            schema = {"type": "object", "properties": {f"p{i}": schema for i in range(width)}}
        elif key in ("anyOf", "oneOf", "allOf"):
            schema = {key: [schema] * width}
        else:
            schema = {"type": "array", key: schema}
    return schema


_SLOW_PATTERNS = (
    "(a+)+b",
    "[ab]*a[ab]{24}",
    "((((a{1,100}){1,100}){1,100}){1,100}){1,100}",
    "(a|b|ab)*c",
    "(x+x+)+y",
    r"(\w+\s?)+$",
    "(.*)*",
    ".*.*.*.*=.*",
    "(a{0,50}){0,50}b",
)
_CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
_TREE = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}}
HOSTILE_SCHEMAS: dict[str, Any] = {
    "anyOf 3 wide, 7 deep": _deep("anyOf", 7, 3),
    "oneOf 3 wide, 9 deep": _deep("oneOf", 6, 3),
    "allOf 3 wide, 6 deep": _deep("allOf", 6, 3),
    "objects nested 31": _deep("properties", 15),
    "objects nested 500": _deep("properties", 30),
    "2,500 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(2_500)}},
    "1,900 required": {
        "type": "object",
        "properties": {f"p{i}": {} for i in range(1_900)},
        "required": [f"p{i}" for i in range(1_900)],
    },
    "enum of 2,049": {"type": "object", "properties": {"x": {"enum": [str(i) for i in range(2_049)]}}},
    "enum of 2,000": {"type": "object", "properties": {"x": {"enum": [f"{MARK}{i}" for i in range(2_000)]}}},
    "maxLength 1e9": {"type": "object", "properties": {"x": {"type": "string", "maxLength": 10**9}}},
    "minLength 1e9": {"type": "object", "properties": {"x": {"type": "string", "minLength": 10**9}}},
    "minLength -1": {"type": "object", "properties": {"x": {"type": "string", "minLength": -1}}},
    "maxItems 1e18": {"type": "object", "properties": {"x": {"type": "array", "maxItems": 10**18}}},
    "minItems 1e9": {"type": "object", "properties": {"x": {"type": "array", "minItems": 10**9}}, "required": ["x"]},
    "minItems above maxItems": {
        "type": "object",
        "properties": {"x": {"type": "array", "minItems": 5, "maxItems": 1}},
        "required": ["x"],
    },
    "minimum above maximum": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 5, "maximum": 1}},
        "required": ["x"],
    },
    "multipleOf 1e-300": {"type": "object", "properties": {"x": {"type": "number", "multipleOf": 1e-300}}},
    "multipleOf 0": {"type": "object", "properties": {"x": {"type": "number", "multipleOf": 0}}},
    "a cycle of references": _CYCLE,
    "a tree without an end": _TREE,
    "a reference outside": {"type": "object", "properties": {"x": {"$ref": f"http://{MARK}.example/x"}}},
    "a type in letters": {"type": "object", "properties": {"x": {"type": "stringg"}}},
    "a pattern of Jinja": {"type": "object", "properties": {"x": {"type": "string", "pattern": "{{ 7*7 }}"}}},
    "a bad pattern": {"type": "object", "properties": {"x": {"type": "string", "pattern": f"({MARK}"}}},
    "a format of nobody": {"type": "object", "properties": {"x": {"type": "string", "format": MARK}}},
    "properties as a list": {"type": "object", "properties": [1]},
    "required as a text": {"type": "object", "required": MARK},
    "required of nobody": {"type": "object", "required": [MARK], "additionalProperties": False},
    "items as a list": {"type": "object", "properties": {"x": {"type": "array", "items": [{}, {}]}}},
    "a type of an object": {"type": {"x": 1}},
    "two types": {"type": ["object", "string", MARK]},
    "const of depth": {"type": "object", "properties": {"x": {"const": _deep("items", 20)}}},
    "33 pattern properties": {"type": "object", "patternProperties": {f"^{'a' * i}": {} for i in range(33)}},
    "not": {"type": "object", "properties": {"x": {"not": {"type": "string"}}}},
    "if and then": {"type": "object", "if": {}, "then": {}},
    **{
        f"pattern {p[:24]}": {
            "type": "object",
            "properties": {"x": {"type": "string", "pattern": p}},
            "required": ["x"],
        }
        for p in _SLOW_PATTERNS
    },
    **{
        f"pattern with {len(p)} letters": {"type": "object", "properties": {"x": {"type": "string", "pattern": p}}}
        for p in ("a" * 1_025, "(" * 400 + ")" * 400, "(?i)" + r"[\x00-\uffff]" * 70, "a{1,9}" * 170)
    },
}

# Half a million patterns in one body: each is short, and nobody may compile them where requests wait.
_MANY_PATTERNS = [
    tool(
        {
            "type": "object",
            "properties": {f"p{i}": {"pattern": f"(?i)[a-z\\d]+{i}-{t}|x{{1,{i + 1}}}"} for i in range(1_000)},
        },
        f"f{t}",
    )
    for t in range(100)
]

STRUCTURED = [
    Case("129 tools", {"tools": [tool({}, f"f{i}") for i in range(129)]}, only=("chat",)),
    Case("two tools of one name", {"tools": [tool({}), tool({"description": MARK})]}, only=("chat",)),
    Case("a function of another type", {"tools": [{"type": MARK, "function": {"name": "f"}}]}, only=("chat",)),
    Case("a tool of another server", {"tools": [{"type": MARK, "name": MARK}]}, (200,), only=("chat", "responses")),
    Case(
        "items of other servers",
        {
            "input": [
                {"role": "user", "content": "x"},
                {"type": "web_search_call", "action": {"query": MARK}, "id": 5},
                {"type": "mcp_call", "name": [MARK], "arguments": 5, "output": {"x": [MARK]}},
                {"type": f"{MARK}_call"},
                {"type": "item_reference", "id": MARK},
                {"type": "local_shell_call", "action": {"env": MARK}},
                {"type": "shell_call_output", "call_id": {}, "output": [5, None, [MARK]]},
                {"type": "tool_search_output", "tools": []},
            ]
        },
        (200,),
    ),
    Case(
        "tools of an item that are none",
        {
            "input": [
                {"role": "user", "content": "x"},
                {"type": "tool_search_output", "tools": [{"type": "function", "name": MARK * 20}]},
            ]
        },
    ),
    Case(
        "100 schemas of 64 branches",
        {
            "tools": [
                tool(
                    {
                        "type": "object",
                        "properties": {
                            "x": {
                                "oneOf": [
                                    {"type": "object", "properties": {"k": {"enum": [f"{i}-{j}" for j in range(9)]}}}
                                    for i in range(64)
                                ]
                            }
                        },
                    },
                    f"f{t}",
                )
                for t in range(100)
            ],
            "tool_choice": "required",
        },
        FINE_OR_BAD,
        only=("chat",),
        seconds=4.0,
        is_heavy=True,
    ),
    Case(
        "a tool of 1 MiB",
        {"tools": [{"type": "function", "function": {"name": "f", "description": MARK * 100_000}}]},
        only=("chat",),
    ),
    Case("a schema of 70 KB", _tools({"type": "object", "description": "x" * 70_000}), only=("chat",)),
    Case(
        "enum of 100,000",
        _tools({"type": "object", "properties": {"x": {"enum": list(range(100_000))}}}),
        only=("chat",),
        seconds=2.0,
    ),
    Case(
        "50,000 properties",
        _tools({"type": "object", "properties": {f"p{i}": {} for i in range(50_000)}}),
        only=("chat",),
        seconds=2.0,
    ),
    Case("100,000 patterns", {"tools": _MANY_PATTERNS}, FINE_OR_BAD, only=("chat",), seconds=2.0, is_heavy=True),
    Case("constraint and stop", {**_schema({"type": "object"}), "stop": ["{"]}, FINE_OR_BAD, seconds=2.0),
    Case(
        "constraint and ignore_eos",
        {**_schema({"type": "object"}), "ignore_eos": True, "max_tokens": 8},
        FINE_OR_BAD,
        seconds=2.0,
    ),
    Case(
        "constraint and min_tokens",
        {"guided_choice": ["a"], "min_tokens": 3, "max_tokens": 5},
        FINE_OR_BAD,
        seconds=2.0,
    ),
    Case("constraint and allowed tokens", {"guided_choice": ["a"], "allowed_token_ids": [1]}, FINE_OR_BAD, seconds=2.0),
    Case(
        "constraint and a bias against it",
        {"guided_choice": ["a"], "logit_bias": {"97": -100}, "max_tokens": 4},
        FINE_OR_BAD,
        seconds=2.0,
    ),
    Case("two constraints", {"guided_choice": ["a"], "guided_regex": "a"}),
    Case("every token but one banned", {"allowed_token_ids": [5], "bad_words": ["\x05"]}, FINE_OR_BAD),
    *(Case(f"schema: {name}", _schema(schema), FINE_OR_BAD, seconds=2.0) for name, schema in HOSTILE_SCHEMAS.items()),
    *(
        Case(f"tool: {name}", _tools(schema), FINE_OR_BAD, only=("chat",), seconds=2.0)
        for name, schema in HOSTILE_SCHEMAS.items()
    ),
    *(Case(f"regex {p[:24]}", {"guided_regex": p, "max_tokens": 12}, FINE_OR_BAD, seconds=2.0) for p in _SLOW_PATTERNS),
    *(
        Case(f"grammar {g[:24]!r}", {"guided_grammar": g, "max_tokens": 12}, FINE_OR_BAD, seconds=2.0)
        for g in (
            'start: start "a" | "a"',
            "start: a\na: b\nb: a",
            'start: ("a" | ("a" "a"))*',
            "start: /(a+)+b/",
            "start: " + "(" * 900 + '"a"' + ")" * 900,
            "\n".join(f"r{i}: r{i + 1}" for i in range(400)) + '\nr400: "a"',
            'start: %json {"type": "stringg"}',
            "start: <|im_end|>",
            "%import common.WORD\nstart: WORD",
            "start: <[1-9999]>",
            'start: "a"{1,1000000000}',
            '%llguidance {"allow_initial_skip": true}\nstart: "a"',
            "start: @x",
            "start: a\na[max_tokens=5]: /.*/",
            'start: "\\ud800"',
            "start: /\\x{110000}/",
        )
    ),
]
