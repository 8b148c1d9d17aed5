"""Calls of the coder format: its forms, and text to typed values."""

from __future__ import annotations

import json

import pytest

from qnext.text.output import Call, Content, CutCall
from tests.text.output.outputs import read, xml_call

TIME = Call("time", "{}")


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (xml_call("time"), [TIME]),
        (xml_call("unknown", a="1"), [Call("unknown", '{"a": "1"}')]),
        ("a \n<function=time>\n</function>", [Content("a"), TIME]),
        ("<function=time>\n</function>\n</tool_call>\n", [TIME]),
        ("<function=time></function></tool_call></tool_call>", [TIME]),
        ("<function=time></function>a</tool_call>", [TIME, Content("a</tool_call>")]),
        (xml_call("time") + "\n</tool_call>", [TIME]),
        ("<tool_call>\n<function=time>\n</function>\n", [TIME]),
        ("<tool_call>\n<function=time>\n</function>\nDone.", [TIME, Content("\nDone.")]),
        ("<tool_call><function=time></function></tool_call>", [TIME]),
        (xml_call("time") + "\n<function=time></function>\n" + xml_call("time"), [TIME] * 3),
    ],
)
def test_forms(text: str, events: list) -> None:
    assert read([text], tool_style="xml") == events


@pytest.mark.parametrize(
    "text",
    [
        "<function=time>",
        "<function=time",
        "<function=>\n</function>",
        "<function=time>\n</function",
        "<function=time>text</function>",
        "<function=ti\nme></function>",
        "<function=time\n</function>",
        "<function=time><parameter=a\n1</parameter></function>",
        "<tool_call>\n<parameter=a>1</parameter></tool_call>",
        "<function=time><parameter=>1</parameter></function>",
        "<function=timer>\n</function>",
        "Write `<function=time></function>`.",
        "<tool_call>\n</function>\n</tool_call>",
    ],
)
def test_malformed_calls_are_content_as_they_are(text: str) -> None:
    assert read([text], tool_style="xml") == [Content(text)]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", "Zürich", "Zürich"),
        ("city", "3", "3"),
        ("city", "null", "null"),
        ("city", '{"a": 1}', '{"a": 1}'),
        ("city", "", ""),
        ("city", "\n two \n", "\n two \n"),
        ("city", "a</parameter>b", "a</parameter>b"),
        ("city", "a</parameter>\n</parameter>", "a</parameter>"),
        ("city", 'a"b\\\t\x01', 'a"b\\\t\x01'),
        ("days", " 3 ", 3),
        ("days", "-0", 0),
        ("days", "3.0", 3),
        ("days", "three", "three"),
        ("days", "03", "03"),
        ("days", "1e3", "1e3"),
        ("days", "+3", 3),
        ("days", "3.", 3),
        ("days", "'3'", 3),
        ("days", '"3"', 3),
        ("days", '"three"', '"three"'),
        ("days", "null", None),
        ("days", "1,000", "1,000"),
        ("scale", ".5", 0.5),
        ("scale", "-.5e1", -5.0),
        ("scale", "+2.50", 2.5),
        ("scale", ".", "."),
        ("scale", "1e-05", 1e-05),
        ("scale", "2", 2),
        ("scale", "nan", "nan"),
        ("scale", "inf", "inf"),
        ("metric", "true", True),
        ("metric", "False", False),
        ("metric", "yes", "yes"),
        ("metric", '"true"', True),
        ("metric", "None", None),
        ("nothing", "None", None),
        ("nothing", "null", None),
        ("nothing", "", ""),
        ("where", '{"a": [1, "ü"]}', {"a": [1, "ü"]}),
        ("where", "[1]", [1]),
        ("where", "nothing", "nothing"),
        ("where", '"{\\"a\\": 1}"', {"a": 1}),
        ("where", '```json\n{"a": 1}\n```', {"a": 1}),
        ("where", "```\n{'a': None}\n```", {"a": None}),
        ("where", "null", None),
        ("tags", "None", None),
        ("tags", '\n["x",\n"y"]', ["x", "y"]),
        ("tags", "['x']", ["x"]),
        ("tags", "('x', True, None)", ["x", True, None]),
        ("note", "null", None),
        ("note", "nullable", "nullable"),
        ("either", "7", 7),
        ("either", "7b", "7b"),
        ("unit", "7", 7),
        ("level", "2", 2),
        ("fixed", "true", True),
        ("anything", "7", 7),
        ("anything", "[1, {}]", [1, {}]),
        ("anything", "seven", "seven"),
        ("anything", "(7)", "(7)"),
        ("anything", "True", True),
        ("anything", "None", None),
        ("anything", "007", "007"),
        ("unknown", "7", "7"),
    ],
)
def test_values_have_the_type_of_the_schema(name: str, text: str, value: object) -> None:
    (call,) = read([xml_call("weather", **{name: text})], tool_style="xml")
    assert isinstance(call, Call)
    found = json.loads(call.arguments)
    assert found == {name: value} and type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("where", '{"a": NaN}'),
        ("where", '{"a": 1} 2'),
        ("where", '{"a": 1'),
        ("where", '{"a": 1, "a": 2}'),
        ("tags", "[" * 65 + "]" * 65),
        ("tags", '["x", "y'),
        ("tags", '["x" "y"]'),
    ],
)
def test_a_broken_list_or_object_is_no_argument(name: str, text: str) -> None:
    call, *_ = read([xml_call("weather", **{name: text})], tool_style="xml")
    assert isinstance(call, CutCall) and call.arguments == f'{{"{name}": '


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "INTEGER"}, "5", 5),
        ({"type": "dict"}, "{'a': 1}", {"a": 1}),
        ({"type": "list"}, "[1]", [1]),
        ({"type": "bool"}, "True", True),
        ({"type": "float"}, "2.5", 2.5),
        ({"type": "str"}, "5", "5"),
        ({"type": "any"}, "5", 5),
        ({"anyOf": [{}, {"type": "null"}]}, "5", 5),
        ({"anyOf": [{"description": "whatever"}, {"type": "null"}]}, "hello", "hello"),
        ({"allOf": [{"type": "integer"}, {"description": "a number"}]}, "5", 5),
        ({"allOf": [{"type": ["integer", "string"]}, {"type": ["string", "null"]}]}, "5", "5"),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, "5.0", 5),
        ({"oneOf": [{"type": "string"}, False]}, "5", "5"),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"type": "integer", "nullable": True}, "5", 5),
    ],
    ids=str,
)
def test_types_as_schemas_write_them(schema: dict, text: str, value: object) -> None:
    tool = {"name": "put", "parameters": {"type": "object", "properties": {"value": schema}}}
    (call,) = read([xml_call("put", value=text)], tool_style="xml", tools=(tool,))
    assert isinstance(call, Call)
    found = json.loads(call.arguments)["value"]
    assert found == value and type(found) is type(value)


def test_a_schema_that_leads_back_many_times_is_looked_at_once() -> None:
    levels = {f"L{n}": {"anyOf": [{"$ref": f"#/$defs/L{(n + k) % 14}"} for k in range(1, 14)]} for n in range(14)}
    levels["L3"] = {"anyOf": [{"type": "integer"}, *levels["L3"]["anyOf"]]}
    parameters = {"type": "object", "properties": {"value": {"$ref": "#/$defs/L0"}}, "$defs": levels}
    (call,) = read([xml_call("put", value="5")], tool_style="xml", tools=({"name": "put", "parameters": parameters},))
    assert call == Call("put", '{"value": 5}')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (xml_call("time", a="x").replace("\n", "\r\n"), "x"),
        (xml_call("time", a="x\ny").replace("\n", "\r\n"), "x\r\ny"),
        (xml_call("time", a="\r\nx\r"), "\r\nx\r"),
        (xml_call("time", a="x").replace("\n", "\n    "), "x"),
        (xml_call("time", a="x\n  y\n\nz").replace("\n", "\n  "), "x\n  y\n\nz"),
        (xml_call("time", a="x").replace("\n</parameter>", "\n  </parameter>"), "x"),
        (xml_call("time", a="  x\n y"), "  x\n y"),
        (xml_call("time", a="x\n    "), "x\n    "),
        ("<tool_call>\n  <function=time>\n    <parameter=a>x\n  y</parameter>\n  </function>\n</tool_call>", "x\n  y"),
        ("<tool_call>\n  <function=time>\n    <parameter=a>\nx\n</parameter>\n  </function>\n</tool_call>", "x"),
    ],
    ids=repr,
)
def test_white_space_of_the_tags_is_none_of_the_value(text: str, value: str) -> None:
    for pieces in ([text], list(text)):
        (call,) = read(pieces, tool_style="xml")
        assert isinstance(call, Call) and json.loads(call.arguments) == {"a": value}


def test_where_a_call_breaks_off_hangs_on_no_cut() -> None:
    for value in ("a\n</parameter>\nb c", "a\n</parameter>b c\nd", "s = '<function=x>'\n</parameter>x y"):
        text = xml_call("time", a=value)
        assert read(text, tool_style="xml") == read([text], tool_style="xml")
        assert isinstance(read([text], tool_style="xml")[0], CutCall)


def test_long_numbers_are_carried_on_as_they_are() -> None:
    digits = "7" * 10_000
    (call,) = read([xml_call("weather", days=digits, scale=digits + ".5e999")], tool_style="xml")
    assert call == Call("weather", f'{{"days": {digits}, "scale": {digits}.5e999}}')


def test_without_schemas_values_are_strings() -> None:
    for tools in ((), ({"name": "weather"},), ({"name": "weather", "parameters": {"properties": {"days": 5}}},)):
        assert read([xml_call("weather", days="3")], tool_style="xml", tools=tools) == [
            Call("weather", '{"days": "3"}')
        ]
