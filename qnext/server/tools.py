"""Tools of a request: their form, which of them may be called, and the constraint that makes it call one. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from qnext.engine.sampling.constraint import GrammarLimits
from qnext.server.bodies import Body
from qnext.server.errors import ApiError
from qnext.server.limits import MAX_NAME_CHARACTERS, MAX_TOOLS

_LIMITS = GrammarLimits()  # a schema is bounded alike as a tool's and as an answer's
_MAX_PATTERNS = 512  # of all tools of a request
_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}

ToolName = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_.-]{{1,{MAX_NAME_CHARACTERS}}}$")]


class FunctionBody(Body):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: str
    function: FunctionBody | None = None


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)]


@dataclass(frozen=True)
class Offer:
    """The tools of a request in OpenAI's form, and how the answer may use them.

    All `tools` stand in the prompt, whatever the choice: what is cached of a conversation stays of use. Those of
    `callable` may be called. `is_required`: it must call one; `name`: it must call that one.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    callable: tuple[Mapping[str, Any], ...] = ()
    is_required: bool = False
    name: str | None = None


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool as chat templates read it."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    function["parameters"] = dict(parameters) if parameters else {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def offered(tools: Sequence[dict[str, Any]], choice: Any, *, param: str = "tools") -> Offer:
    """The offer that tools and a tool_choice make: "auto", "none", "required", {"type": "function", ...} with a name,
    or {"type": "allowed_tools", ...}. Raises ApiError 400 for tools or choices that cannot be."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError.bad("two tools have the same name", param=param)
    num_patterns = 0
    for index, tool in enumerate(tools):
        num_patterns += check_schema(tool["function"]["parameters"], param=f"{param}.{index}.parameters")
        if num_patterns > _MAX_PATTERNS:
            raise ApiError.bad(f"the tools have more than {_MAX_PATTERNS} patterns", param=param)
    if choice is None or choice == "auto":
        return Offer(tuple(tools), tuple(tools))
    if choice == "none":
        return Offer(tuple(tools))
    if choice == "required":
        if not tools:
            raise ApiError.bad("tool_choice needs tools", param="tool_choice")
        return Offer(tuple(tools), tuple(tools), is_required=True)
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            return _allowed(tools, choice)
        name = _choice_name(choice)
        if name is not None:
            if name not in names:
                raise ApiError.bad("tool_choice names a tool that is not offered", param="tool_choice")
            return Offer(tuple(tools), tuple(tools), is_required=True, name=name)
    raise ApiError.bad("tool_choice must be none, auto, required or name a tool", param="tool_choice")


def _choice_name(choice: Mapping[str, Any]) -> str | None:
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) and choice.get("type") == "function" else None


def _allowed(tools: Sequence[dict[str, Any]], choice: Mapping[str, Any]) -> Offer:
    inner = choice.get("allowed_tools", choice)
    entries = inner.get("tools") if isinstance(inner, dict) else None
    mode = inner.get("mode", "auto") if isinstance(inner, dict) else None
    if not isinstance(entries, list) or not entries or mode not in ("auto", "required") or len(entries) > MAX_TOOLS:
        raise ApiError.bad("allowed_tools needs a mode and a list of tools", param="tool_choice")
    wanted = {_choice_name(entry) if isinstance(entry, dict) else None for entry in entries}
    kept = tuple(tool for tool in tools if tool["function"]["name"] in wanted)
    if None in wanted or len(kept) < len(wanted):
        raise ApiError.bad("tool_choice names a tool that is not offered", param="tool_choice")
    return Offer(tuple(tools), kept, is_required=mode == "required")


def check_schema(schema: object, *, param: str) -> int:
    """The number of patterns. Raises ApiError 400 for what is no JSON schema of an object's properties, or too large
    for one."""
    if not isinstance(schema, dict):
        raise ApiError.bad("the parameters of a tool must be a JSON schema object", param=param)
    if schema.get("type", "object") != "object":
        raise ApiError.bad("the parameters of a tool must be of type object", param=param)
    if len(json.dumps(schema)) > _LIMITS.max_schema_bytes:
        raise ApiError.bad(f"the schema is larger than {_LIMITS.max_schema_bytes} bytes", param=param)
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    num_nodes = num_patterns = 0
    while waiting:
        node, depth = waiting.pop()
        num_nodes += 1
        if depth > _LIMITS.max_schema_depth or num_nodes > _LIMITS.max_schema_nodes:
            raise ApiError.bad("the schema is too deep or has too many parts", param=param)
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise ApiError.bad("a schema inside the schema is not an object", param=param)
        num_patterns += "pattern" in node
        if num_patterns > _MAX_PATTERNS:
            raise ApiError.bad(f"the schema has more than {_MAX_PATTERNS} patterns", param=param)
        _check_node(node, param)
        waiting.extend((child, depth + 1) for child in _children(node, param))
    return num_patterns


def _check_node(node: Mapping[str, Any], param: str) -> None:
    kinds = node.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ApiError.bad("the schema has an unknown type", param=param)
    pattern = node.get("pattern", "")
    if not isinstance(pattern, str) or len(pattern) > _LIMITS.max_regex_length or not _is_pattern(pattern):
        raise ApiError.bad("the schema has a pattern that is no regular expression", param=param)
    values = node.get("enum", [])
    if not isinstance(values, list) or len(values) > _LIMITS.max_enum_values:
        raise ApiError.bad("an enum of the schema is no list, or too long", param=param)


def _is_pattern(pattern: str) -> bool:
    # ECMAScript's names of groups and classes of characters, written as Python writes them or as any character.
    pattern = re.sub(r"\(\?<(?![=!])", "(?P<", pattern)
    pattern = re.sub(r"\\[pP]\{[^}]*\}", r"\\w", pattern)
    # ECMAScript has no flags; to fold the case of a class, Python walks through all its characters, for seconds.
    pattern = re.sub(r"\(\?[a-zA-Z-]+([:)])", lambda found: "(?:" if found[1] == ":" else "", pattern)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _children(node: Mapping[str, Any], param: str) -> list[Any]:
    found: list[Any] = []
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        inner = node.get(key, {})
        if not isinstance(inner, dict):
            raise ApiError.bad("the schema has properties that are no object", param=param)
        found.extend(inner.values())
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        inner = node.get(key, [])
        if not isinstance(inner, list):
            raise ApiError.bad(f"{key} in the schema is no list", param=param)
        found.extend(inner)
    found.extend(
        node[key] for key in ("items", "additionalProperties", "not") if isinstance(node.get(key), (dict, bool))
    )
    return found
