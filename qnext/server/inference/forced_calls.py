"""The constraint that forces a call of a tool.

The server describes it as data, and a child process, which can be killed, makes a grammar from it. That process imports
this file, so the file needs neither pydantic nor torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qnext.engine.sampling.schemas import enforceable
from qnext.errors import UsageError
from qnext.text.output.grammar import tool_call_grammar


def forced_calls(
    tools: Sequence[Mapping[str, Any]],
    *,
    strict: Collection[str],
    style: str,
    name: str | None,
    parallel: bool,
    control_names: Collection[str],
) -> dict[str, Any]:
    """The value of a constraint "calls". `strict` names the tools whose schema must be enforced completely."""
    return {
        "tools": list(tools),
        "strict": sorted(strict),
        "style": style,
        "name": name,
        "parallel": parallel,
        "control_names": sorted(control_names),
    }


def written_calls(value: Mapping[str, Any]) -> str:
    """The Lark grammar of a value of `forced_calls`. Raises UsageError, which names the tool by its number."""
    strict = frozenset(value["strict"])
    tools: list[dict[str, Any]] = []
    for index, tool in enumerate(value["tools"]):
        function = tool["function"]
        try:
            schema = enforceable(function["parameters"], is_strict=function["name"] in strict).schema
        except UsageError as error:
            raise UsageError(f"tools.{index}: {str(error).removeprefix('json_schema: ')}") from None
        tools.append({"type": "function", "function": {**function, "parameters": schema}})
    return tool_call_grammar(
        tools,
        style=value["style"],
        name=value["name"],
        parallel=value["parallel"],
        control_names=value["control_names"],
    )
