"""The tools of a request: their form, which of them may be called, and the constraint that forces a call. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from qnext.engine.sampling.constraint import GrammarLimits, check_nodes, check_volume
from qnext.engine.sampling.schemas import without_nulls
from qnext.errors import UsageError
from qnext.server.body.strict import Body
from qnext.server.errors import ApiError
from qnext.server.limits import MAX_NAME_CHARACTERS, MAX_TOOLS

_LIMITS = GrammarLimits()  # a schema is bounded alike as a tool's and as an answer's

# Letters of any script, digits, and the signs that servers of tools write into names; nothing that ends a tag or text.
ToolName = Annotated[str, Field(pattern=rf"^[\w.:/@+~$#-]{{1,{MAX_NAME_CHARACTERS}}}$")]


class FunctionBody(Body):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomBody(Body):
    """A tool whose input is free text."""

    name: ToolName
    description: str | None = None
    format: dict[str, Any] | None = None


class ToolBody(Body):
    type: Annotated[str, Field(max_length=64)]
    function: FunctionBody | None = None
    custom: CustomBody | None = None


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)]


@dataclass(frozen=True)
class Origin:
    """A tool of another kind that the model sees as a function. Its calls are written in the tool's own form."""

    kind: str  # function, custom, local_shell, shell, apply_patch or tool_search
    name: str
    namespace: str | None = None


@dataclass(frozen=True)
class Offer:
    """The tools of a request in OpenAI's form, and how the answer may use them.

    All `tools` are in the prompt, whatever the choice, so that its cached prefix stays the same. Those of `callable`
    may be called. `is_required`: the answer must call one. `name`: it must call that one. `origins` are the tools that
    are no plain functions. `strict` names the tools whose whole schema must be enforced where a call is forced.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    callable: tuple[Mapping[str, Any], ...] = ()
    is_required: bool = False
    name: str | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    strict: frozenset[str] = frozenset()


@dataclass
class Collected:
    """The tools of a request while they are read: each once, in the order in which they came."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)
    strict: set[str] = field(default_factory=set)

    def add(
        self,
        name: str,
        description: str | None,
        parameters: Mapping[str, Any] | None,
        *,
        origin: Origin | None = None,
        is_strict: bool | None = None,
        param: str = "tools",
    ) -> None:
        """Add a tool once. Raises ApiError 400 for a different tool of the same name."""
        tool = function_tool(name, description, parameters)
        known = next((other for other in self.tools if other["function"]["name"] == name), None)
        if known is not None and (known != tool or self.origins.get(name) != origin):
            raise ApiError.bad("two tools have the same name", param=param)
        if known is None:
            self.tools.append(tool)
        if origin is not None:
            self.origins[name] = origin
        if is_strict:
            self.strict.add(name)

    def offered(self, choice: Any) -> Offer:
        return replace(
            offered(self.tools, choice, origins=self.origins), origins=self.origins, strict=frozenset(self.strict)
        )


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool as chat templates read it: with the schema as it was written, without nulls."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    text = json.dumps(parameters)  # much faster than to walk through a schema, of which most have nothing to leave out
    has_more = "null" in text or "[]" in text
    function["parameters"] = (without_nulls(parameters) if has_more else parameters) or {
        "type": "object",
        "properties": {},
    }
    return {"type": "function", "function": function}


def free_text(format_: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a custom tool: its input is one text. The model sees the tool's grammar."""
    note = "The whole input, as free text."
    inner = (format_ or {}).get("grammar", format_) or {}
    definition, syntax = inner.get("definition"), inner.get("syntax")
    if isinstance(definition, str) and isinstance(syntax, str):
        note += f" It follows this grammar ({syntax}):\n{definition}"
    properties = {"input": {"type": "string", "description": note}}
    return {"type": "object", "properties": properties, "required": ["input"], "additionalProperties": False}


def free_input(arguments: str) -> str:
    """The input of a custom tool, taken from arguments in its schema's form. Arguments of another form are the input
    itself."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    found = value.get("input") if isinstance(value, dict) else None
    return found if isinstance(found, str) else arguments


def offered(
    tools: Sequence[dict[str, Any]],
    choice: Any,
    *,
    origins: Mapping[str, Origin] | None = None,
) -> Offer:
    """The offer of tools under a tool_choice. Raises ApiError 400 for an impossible choice. Schemas are not checked
    here.

    `choice` is "auto", "none", "required", {"type": "function", ...} with a name, or {"type": "allowed_tools", ...}.
    """
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
            return _allowed(tools, choice, origins or {})
        name = _choice_name(choice, origins or {})
        if name is not None:
            if name not in _names(tools):
                raise ApiError.bad("tool_choice names a tool that is not offered", param="tool_choice")
            return Offer(tuple(tools), tuple(tools), is_required=True, name=name)
    raise ApiError.bad("tool_choice must be none, auto, required or name a tool", param="tool_choice")


def _names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def _choice_name(choice: Mapping[str, Any], origins: Mapping[str, Origin]) -> str | None:
    """The name by which the model knows a tool: {"name"}, {"function": {"name"}}, {"custom": {"name"}}, or a kind."""
    kind = choice.get("type")
    if not isinstance(kind, str):
        return None
    inner = choice.get(kind, choice)
    name = inner.get("name", None if kind in ("function", "custom") else kind) if isinstance(inner, dict) else None
    if not isinstance(name, str):
        return None
    namespace = choice.get("namespace")
    for known, origin in origins.items():
        if origin.kind == kind and origin.name == name and namespace in (None, origin.namespace):
            return known
    return name if kind in ("function", "custom") else None


def _allowed(tools: Sequence[dict[str, Any]], choice: Mapping[str, Any], origins: Mapping[str, Origin]) -> Offer:
    inner = choice.get("allowed_tools", choice)
    entries = inner.get("tools") if isinstance(inner, dict) else None
    mode = inner.get("mode", "auto") if isinstance(inner, dict) else None
    if not isinstance(entries, list) or not entries or mode not in ("auto", "required") or len(entries) > MAX_TOOLS:
        raise ApiError.bad("allowed_tools needs a mode and a list of tools", param="tool_choice")
    wanted = {_choice_name(entry, origins) if isinstance(entry, dict) else None for entry in entries}
    kept = tuple(tool for tool in tools if tool["function"]["name"] in wanted)
    if None in wanted or len(kept) < len(wanted):
        raise ApiError.bad("tool_choice names a tool that is not offered", param="tool_choice")
    return Offer(tuple(tools), kept, is_required=mode == "required")


def check_tools(tools: Sequence[Mapping[str, Any]], *, param: str = "tools") -> None:
    """Call check_schema for each. Do so in a thread: a hundred large schemas take longer than the event loop may
    wait."""
    for index, tool in enumerate(tools):
        check_schema(tool["function"]["parameters"], param=f"{param}.{index}.parameters")


def check_schema(schema: object, *, param: str) -> None:
    """Raises ApiError 400 for a value that is no JSON schema of an object's properties, or that is too large for one.

    Its keywords are checked only where a call is forced. Otherwise the model reads the schema as it is.
    """
    if not isinstance(schema, dict):
        raise ApiError.bad("the parameters of a tool must be a JSON schema object", param=param)
    kinds = schema.get("type", "object")
    names = [kind.lower() for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)]
    if names and "object" not in names:
        raise ApiError.bad("the parameters of a tool must be of type object", param=param)
    try:
        check_volume("json_schema", schema, _LIMITS.max_schema_bytes)
        check_nodes(schema, _LIMITS)
    except UsageError as error:
        raise ApiError.bad(str(error).replace("json_schema:", "the schema is"), param=param) from None
