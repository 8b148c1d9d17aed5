"""The grammar of tool_choice lets through what the parsers read as the right calls, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.engine.sampling.constraint import Constraint
from qnext.engine.sampling.grammar import GrammarCompiler, GrammarState, Vocabulary
from qnext.errors import UsageError
from qnext.text.output import Call, tool_call_grammar
from tests.engine.grammar_ends import can_end, must_end
from tests.text.output.outputs import json_call, read, xml_call

MARKS = ("<tool_call>", "</tool_call>")
END = 256
PIECES = (
    b"\n</parameter>\n",
    b"</function>\n",
    b"<parameter=",
    b'"}\n',
    b'": ',
    b'"',
    b"}",
    b"\n",
)  # also as one token
TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast",
            "parameters": {
                "type": "object",
                "title": "Weather",
                "properties": {
                    "city": {"type": "string", "description": "Où?"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9, "default": 1},
                    "unit": {"$ref": "#/$defs/Unit"},
                    "title": {"type": "boolean"},
                    "box": {"type": "array", "items": {"$ref": "#/$defs/Unit"}, "maxItems": 2},
                },
                "required": ["city", "title"],
                "additionalProperties": False,
                "$defs": {"Unit": {"enum": ["°C", "", 'F"'], "title": "Unit"}},
            },
        },
    },
    {"name": "zeit", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    {"name": "bare"},
)
RIGHT = {"city": "Zürich 🙂", "days": 3, "unit": "°C", "title": True, "box": ["", 'F"']}


@cache
def compiler(has_marks: bool) -> GrammarCompiler:
    table = [bytes([byte]) for byte in range(256)] + [b"<|im_end|>", *PIECES]
    special = [END]
    if has_marks:
        special += [len(table), len(table) + 1]
        table += [mark.encode() for mark in MARKS]
    return GrammarCompiler(Vocabulary(table, eos_ids={END}, special_ids=special, size=len(table) + 7))


def state(has_marks: bool, *, tools: Sequence[Mapping[str, Any]] = TOOLS, **options: Any) -> GrammarState:
    defaults = {"style": "json", "name": None, "parallel": True, "control_names": MARKS if has_marks else ()}
    text = tool_call_grammar(tools, **{**defaults, **options})
    return compiler(has_marks).compile(Constraint("lark", text)).new_state()


def tokens_of(text: str, has_marks: bool) -> list[int]:
    """Bytes, and the tags of calls as the tokens that they are."""
    if not has_marks:
        return list(text.encode())
    parts = text.replace(MARKS[0], "\udc80").replace(MARKS[1], "\udc81")
    first = 257 + len(PIECES)
    return [
        token
        for part in parts
        for token in ([first + ord(part) - 0xDC80] if "\udc80" <= part <= "\udc81" else part.encode())
    ]


def accepts(made: GrammarState, text: str, has_marks: bool) -> bool:
    for token in tokens_of(text, has_marks):
        if not made.allows(token):
            return False
        made.accept(token)
    return can_end(made)


def right_json(name: str = "weather", **changes: Any) -> str:
    return json_call(name, json.dumps({**RIGHT, **changes}, ensure_ascii=False))


def right_xml(**changes: str | None) -> str:
    values = {"city": "Zürich\n 🙂", "days": "3", "unit": "°C", "title": "true", "box": '["F\\""]', **changes}
    return xml_call("weather", **{name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (right_json(), True),
        ("\n\n" + right_json(), True),
        (json_call("weather", '{"city":"x","title":false}'), True),
        (json_call("zeit", "{}"), True),
        (json_call("bare", '{"x": [1]}'), True),
        (json_call("zeit", "{}") + "\n" + right_json() + "\n" + json_call("zeit", "{}"), True),
        (right_json(city="<tool_call"), True),
        ("", False),
        ("\n", False),
        ("Let me see. " + right_json(), False),
        (right_json() + "\n", False),
        (right_json() + " Done.", False),
        (right_json("whether"), False),
        (right_json("zeit"), False),
        (right_json(days="3"), False),
        (right_json(days=30), False),
        (right_json(unit="K"), False),
        (right_json(box=["K"]), False),
        (right_json(extra=1), False),
        (json_call("weather", '{"city": "x"}'), False),
        (json_call("weather", "null"), False),
        (json_call("bare", "[]"), False),
        (right_json()[:-1], False),
    ],
)
def test_json_calls(text: str, is_right: bool, has_marks: bool) -> None:
    assert accepts(state(has_marks), text, has_marks) == is_right


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (right_xml(), True),
        (right_xml(unit=None, days=None, box=None), True),
        (right_xml(city="", unit=""), True),
        (right_xml(city="a </parameter> <b> </function>\n"), True),
        (xml_call("zeit"), True),
        (xml_call("bare"), True),
        ("\n\n" + xml_call("zeit") + "\n" + right_xml(), True),
        (right_xml(city="a</parameter>\n<parameter=days>"), False),
        (right_xml(city="a</parameter></function>"), False),
        (right_xml(city=None), False),
        (right_xml(title=None), False),
        (right_xml(title="yes"), False),
        (right_xml(days="x"), False),
        (right_xml(days="10"), False),
        (right_xml(unit="K"), False),
        (right_xml(box='["K"]'), False),
        (right_xml(extra="1"), False),
        (xml_call("whether"), False),
        (xml_call("zeit", city="x"), False),
        ("<function=zeit>\n</function>", False),
        (xml_call("zeit") + " Done.", False),
    ],
)
def test_xml_calls(text: str, is_right: bool, has_marks: bool) -> None:
    assert accepts(state(has_marks, style="xml"), text, has_marks) == is_right


@pytest.mark.parametrize("style", ["json", "xml"])
def test_one_tool_and_one_call_alone(style: str) -> None:
    call, other = (json_call("zeit", "{}"), right_json()) if style == "json" else (xml_call("zeit"), right_xml())
    for name, parallel, text, is_right in [
        ("zeit", False, call, True),
        ("zeit", True, call + "\n" + call, True),
        ("zeit", True, call + "\n" + other, False),
        ("zeit", False, call + "\n" + call, False),
        ("zeit", False, other, False),
        (None, False, other, True),
        (None, False, call + "\n" + other, False),
    ]:
        made = state(True, style=style, name=name, parallel=parallel)
        assert accepts(made, text, True) == is_right
        if is_right and not parallel:
            assert must_end(made)


def test_tags_are_the_tokens_where_there_are_any() -> None:
    assert not accepts(state(True), json_call("zeit", "{}"), False)
    made = state(True)
    assert not made.allows(END) and made.allows(tokens_of(MARKS[0], True)[0])
    assert not made.allows(ord("<"))
    assert state(False).allows(ord("<"))


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize("style", ["json", "xml"])
def test_random_outputs_are_read_as_right_calls(style: str, has_marks: bool) -> None:
    schemas = {"weather": TOOLS[0]["function"]["parameters"], "zeit": TOOLS[1]["parameters"], "bare": {}}
    names = set()
    for seed in range(30):
        made = state(has_marks, style=style, name=("weather", None)[seed % 2])
        text = sampled(made, seed)
        events = read([text], tool_style=style, tools=TOOLS)
        assert events, text
        for event in events:
            assert isinstance(event, Call), (text, event)
            arguments = json.loads(event.arguments)
            if style == "json" or event.name != "weather":
                jsonschema.validate(arguments, schemas[event.name])
            else:
                assert {"city", "title"} <= set(arguments) and isinstance(arguments["title"], bool)
                jsonschema.validate(arguments, schemas["weather"])
            names.add(event.name)
    assert len(names) > 1


def sampled(made: GrammarState, seed: int) -> str:
    """A random output that ends when it can, and closes what is open rather than goes on."""
    draw = random.Random(seed)
    table = made._vocabulary.token_bytes
    closing = {257 + index for index in range(len(PIECES))}
    tokens: list[int] = []
    while not (can_end(made) and (must_end(made) or draw.random() < 0.7)):
        ids = np.flatnonzero(np.unpackbits(made.allowed().view(np.uint8), bitorder="little")).tolist()
        ids = [token for token in ids if token != END]
        ends = [token for token in ids if token in closing]
        tokens.append(draw.choice(ends if ends and draw.random() < 0.5 else ids))
        made.accept(tokens[-1])
        assert len(tokens) < 5000
    return b"".join(table[token] for token in tokens).decode()


def test_notes_are_left_out_and_properties_of_their_names_stay() -> None:
    text = tool_call_grammar(TOOLS, style="json", name=None, parallel=False, control_names=())
    assert "Forecast" not in text and "Où" not in text and '"title":"' not in text
    assert '"title":{"type":"boolean"}' in text


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a/b", "é🙂", "a\nb", "\x00\x7f", "%json {}", "<tool_call>"])
def test_names_are_text_whatever_they_hold(name: str) -> None:
    tools = [{"name": name, "parameters": {"type": "object", "properties": {name: {"type": "boolean"}}}}]
    call = (
        "<tool_call>\n" + json.dumps({"name": name, "arguments": {name: True}}, ensure_ascii=False) + "\n</tool_call>"
    )
    assert accepts(state(False, tools=tools, parallel=False), call, False)
    assert accepts(state(False, tools=tools, style="xml", parallel=False), xml_call(name, **{name: "true"}), False)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return {"name": "deep", "parameters": {"properties": {"a": schema}}}


@pytest.mark.parametrize("style", ["json", "xml"])
def test_what_no_grammar_can_be_made_of_is_refused(style: str) -> None:
    def refused(tools: Sequence[Mapping[str, Any]], name: str | None = None) -> str:
        with pytest.raises(UsageError) as error:
            tool_call_grammar(tools, style=style, name=name, parallel=True, control_names=())
        return str(error.value)

    assert "no tools" in refused([])
    assert "'clock'" in refused(TOOLS, "clock")
    assert "nested" in refused([deep(500)])
    wide: dict[str, Any] = {"enum": [[]]}
    for _ in range(2000):
        wide = {"enum": [wide["enum"]]}
    assert "nested" in refused([{"name": "deep", "parameters": {"properties": {"a": wide}}}])
    assert "x-guidance" in refused([{"name": "a", "parameters": {"properties": {"b": {"x-guidance": {}}}}}])
    assert tool_call_grammar([deep(20)], style=style, name=None, parallel=True, control_names=())


def test_arguments_are_an_object_whatever_the_schema_says() -> None:
    for schema in ({"type": "string"}, {"type": ["object", "null"]}, {"anyOf": [{"type": "null"}, {"type": "object"}]}):
        tools = [{"name": "zeit", "parameters": schema}]
        assert accepts(state(False, tools=tools), json_call("zeit", "{}"), False)
        assert not accepts(state(False, tools=tools), json_call("zeit", "null"), False)
        assert not accepts(state(False, tools=tools), json_call("zeit", '"{}"'), False)


keywords = st.sampled_from(
    ["type", "properties", "items", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "required", "a", "title"]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from(["string", "integer", "object", "#", "#/$defs/a", "a", ""])
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keywords, inner, max_size=4)),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(schemas, st.dictionaries(keywords, schemas, max_size=4))
def test_strange_schemas_harm_nobody(parameters: Any, properties: dict[str, Any]) -> None:
    """They may leave an argument untyped or fail to compile; calls are read all the same."""
    for schema in (parameters, {"properties": properties, "$defs": properties}):
        tools = [{"name": "zeit", "parameters": schema}]
        for style in ("json", "xml"):
            text = tool_call_grammar(tools, style=style, name="zeit", parallel=True, control_names=())
            assert text.startswith("start: ")
        (call,) = read([xml_call("zeit", a="1", type="x")], tool_style="xml", tools=tools)
        assert isinstance(call, Call) and set(json.loads(call.arguments)) == {"a", "type"}
