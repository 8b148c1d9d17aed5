"""Lark text for answers that must call a tool, in the form in which the chat formats write calls."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qnext.errors import UsageError
from qnext.text.output.parser import ToolStyle
from qnext.text.output.scan import TOOL_CALL, TOOL_CALL_END
from qnext.text.output.values import named_parameters, resolved, types_of

MAX_SCHEMA_DEPTH = 32

_NOTES = ("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$schema")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # hold schemas by name
_DATA = ("enum", "const")  # hold values, not schemas
# A value ends at its first closing tag on a line of its own, and never holds what the parser could take for its end: a
# tag behind a closing tag, or one that begins a line.
_TEXT = (
    r'text[suffix="\n</parameter>\n"]: VALUE',
    r"VALUE: /(?s:.*)/ & ~/(?s:.*)<\/[ \t]*parameter[ \t]*>[ \t\r\n]*<[ \t]*(parameter|\/[ \t]*function)(?s:.*)/"
    r" & ~/((?s:.*)\n)?[ \t]*<[ \t]*\/?[ \t]*(tool_call|function|parameter)(?s:.*)/",
)
_WHITE_SPACE = r"[ \t\n\r]{1,64}"  # without a bound it is what a model writes that knows nothing to write


def tool_call_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    style: ToolStyle,
    name: str | None,
    parallel: bool,
    control_names: Collection[str],
) -> str:
    """Lark text of an answer that is one call, or with `parallel` one or more.

    The call is of the tool `name`, else of any, with arguments by the tool's schema; newlines may stand before it. In
    the XML style parameters come in the schema's order, and an object's that no schema names are left out.
    `control_names` are the tags that are tokens of their own. Raises UsageError without tools, for an unknown name and
    for a schema that is nested too deeply or uses a grammar's own options.
    """
    chosen = [tool for tool in map(named_parameters, tools) if name in (None, tool[0])]
    if not chosen:
        raise UsageError(
            "tool_choice: there are no tools" if name is None else f"tool_choice: no tool is named {name!r}"
        )
    start, end = (tag if tag in control_names else json.dumps(tag) for tag in (TOOL_CALL, TOOL_CALL_END))
    rules = [r'start: (/\n{1,4}/)? call ("\n" call)*' if parallel else r"start: (/\n{1,4}/)? call"]
    rules.append(f"call: {start} body {end}")
    rules.append("body: " + " | ".join(f"call_{index}" for index in range(len(chosen))))
    values: dict[str, str] = {}
    for index, (tool, schema) in enumerate(chosen):
        bare = {**_without_notes(schema), "type": "object"}
        rules += _json_rules(index, tool, bare) if style == "json" else [_xml_rule(index, tool, bare, values)]
    rules += [f"{rule}: {value}" for value, rule in values.items()]
    if style == "xml":
        rules += _TEXT
    return "\n".join(rules) + "\n"


def _json_rules(index: int, name: str, schema: Mapping[str, Any]) -> list[str]:
    head = '\n{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": '
    return [f"call_{index}: {json.dumps(head)} arguments_{index} " + r'"}\n"', f"arguments_{index}: {_json(schema)}"]


def _xml_rule(index: int, name: str, schema: Mapping[str, Any], values: dict[str, str]) -> str:
    """The rule of a call; `values` takes up the rules of values by their Lark, since many are alike."""
    properties = schema.get("properties")
    required = schema.get("required")
    parts = [json.dumps(f"\n<function={name}>\n")]
    for key, value in properties.items() if isinstance(properties, Mapping) else ():
        rule = values.setdefault(_xml_value(value, schema), f"value_{len(values)}")
        part = json.dumps(f"<parameter={key}>\n") + " " + rule
        parts.append(part if isinstance(required, list) and key in required else f"({part})?")
    parts.append(r'"</function>\n"')
    return f"call_{index}: " + " ".join(parts)


def _xml_value(schema: Any, root: Mapping[str, Any]) -> str:
    """Lark of a value and the closing tag behind it."""
    end = r'"\n</parameter>\n"'
    found = resolved(schema, root)
    values = found.get("enum") if isinstance(found, Mapping) else None
    if isinstance(values, list) and values:
        texts = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)
        return "(" + " | ".join(json.dumps(text) if text else '""' for text in texts) + f") {end}"
    types = types_of(schema, root)
    if not types or "string" in types:
        return "text"
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    has_references = '"$ref"' in json.dumps(found)
    return f"{_json({**shared, **found} if has_references else found)} {end}"


def _json(schema: Mapping[str, Any]) -> str:
    options = {"whitespace_pattern": _WHITE_SPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options}, separators=(",", ":"))


def _without_notes(value: Any, depth: int = 1, *, is_schema: bool = True) -> Any:
    """The schema, or a value in one, without what says nothing about the form of an output."""
    if depth > MAX_SCHEMA_DEPTH:
        raise UsageError(f"tools: a schema is nested deeper than {MAX_SCHEMA_DEPTH}")
    if isinstance(value, list):
        return [_without_notes(entry, depth + 1, is_schema=is_schema) for entry in value]
    if not isinstance(value, Mapping):
        return value
    if is_schema and "x-guidance" in value:
        raise UsageError("tools: x-guidance is not supported")
    kept: dict[str, Any] = {}
    for key, entry in value.items():
        if is_schema and key in _NAMED and isinstance(entry, Mapping):
            kept[key] = {name: _without_notes(named, depth + 2) for name, named in entry.items()}
        elif not is_schema or key not in _NOTES:
            kept[key] = _without_notes(entry, depth + 1, is_schema=is_schema and key not in _DATA)
    return kept
