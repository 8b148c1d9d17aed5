"""Answers as models write them, good and bad, and how they are read in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qnext.text.output import OutputEvent, OutputParser
from qnext.text.output.events import joined

TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "scale": {"type": "number"},
                    "metric": {"type": "boolean"},
                    "nothing": {"type": "null"},
                    "where": {"type": "object"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "either": {"type": ["integer", "string"]},
                    "unit": {"$ref": "#/$defs/Unit"},
                    "level": {"enum": [1, 2]},
                    "fixed": {"const": True},
                    "anything": {},
                },
                "$defs": {"Unit": {"oneOf": [{"type": "integer"}, {"$ref": "#/$defs/Unit"}]}},
            },
        },
    },
    {"name": "time", "parameters": {"type": "object", "properties": {}}},
)


def json_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml_call(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


JSON_OUTPUTS = [
    "",
    "Plain text.\n",
    " \n\t ",
    json_call("time", "{}"),
    "I look. \n\n" + json_call("weather", '{"city": "Zürich 🙂", "days": 3}') + "\n",
    json_call("time", "{}") + "\n" + json_call("time", '{"a": [1, {"b": null}]}') + "\n\nDone.\n",
    json_call("time", '{"text": "</tool_call> {{{ <tool_call> \\" \\\\"}'),
    '<tool_call>{"arguments": {"x": "\\u00e9"}, "name": "time"}</tool_call>',
    '<tool_call>{"name":"time","arguments":"{\\"x\\": 1}"}</tool_call> tail',
    '<tool_call>{"name": "time"}</tool_call>  <tool_call>{"name": "time", "arguments": null}</tool_call>',
    '<tool_call>{"name": "time", "arguments": {"a": 1}\n</tool_call>\n' + json_call("time", "{}"),
    '<tool_call>{"name": "time", "arguments": {"a": "x\n"}}</tool_call> ' + json_call("time", "{}"),
    "The tags <tool_call> and </tool_call>, <tool_cal>, <tool_<tool_call>" + json_call("time", "{}"),
    "a < b, a <t, <<<tool_call>>>",
    json_call("time", '{"a": 1, "a": 2}') + json_call("time", '{"a": NaN}'),
    json_call("time", "[1]") + json_call("", "{}") + json_call("time", '"no"') + json_call("time", "5"),
    json_call("time", '{"a": ' + "[" * 70 + "]" * 70 + "}") + "x",
    "<tool_call>\n\n<tool_call>\n" + json_call("time", "{}"),
    json_call("time", "{}") + "</tool_call>",
    '<tool_call>{"name": "time", "arguments": {"path": "C:\\\\"}}</tool_cal' + json_call("time", "{}"),
    "<think>\n\nHm <tool_call> <think> </thin\n\n</think>\n\nYes. " + json_call("time", "{}"),
    " \n<think></think>" + json_call("time", "{}"),
    "<thin>k <think>no</think>",
    "Hm, " + json_call("time", "{}") + "\n</think>\n\n\n" + json_call("time", "{}") + "\n</think>",
    "\n\nA thought without an end </thi",
]

XML_OUTPUTS = [
    xml_call("time"),
    "I look.\n\n" + xml_call("weather", city="Zürich 🙂", days="3", metric="True") + "\n",
    xml_call("time") + "\n" + xml_call("weather", city="a\n\nb", tags='["x", "</parameter>"]') + "\nDone.",
    xml_call("weather", city="x </parameter> <parameter y </parameter>\n </parameter", note="null"),
    xml_call("weather", city="<tool_call>\n<function=f>\n</function>\n</tool_call>"),
    "<function=time>\n</function>\n</tool_call>\nText </tool_call> <function=time> </function> <function=f></function>",
    "<function=weather><parameter=days>2</parameter></function> \n </tool_cal",
    "Write <function=name> or <function= or <function=>\n</function> or <tool_call> " + xml_call("time"),
    xml_call("weather", city="x").replace("</function>", "</functio>") + xml_call("time"),
    xml_call("weather", days="1").replace("</parameter>\n", "</parameter> <parameter=days>2</parameter>\n"),
    "<tool_call>\n<function=a\nb>\n</function>\n</tool_call><tool_call><function=f><parameter=></parameter></function>",
    "<tool_call>\n<function=weather>\n<parameter=city>\n\n</parameter>\n</function>\n</tool_call>",
    "<think>\n<function=time></function></think>\n\n<function=time></function>",
]


def read(pieces: Iterable[str], **options: Any) -> list[OutputEvent]:
    """The joined events of an answer that comes in these pieces."""
    parser = OutputParser(**{"tool_style": "json", "tools": TOOLS, **options})
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined([*events, *parser.finish()])


def content_of(events: Sequence[OutputEvent]) -> str:
    return "".join(event.text for event in events if type(event).__name__ == "Content")
