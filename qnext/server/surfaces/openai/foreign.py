"""Tools and items of OpenAI's responses API that are no functions, in a form that a text model reads, and back.

A tool that the client runs becomes a function, and its calls become items of the client's kind again. A tool that a
server runs is ignored. Items of earlier turns become calls, results, or a short text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from qnext.server.surfaces.history import Note, gist, part_text
from qnext.server.surfaces.tools import Origin, free_input
from qnext.text.messages import Message, ToolCall
from qnext.text.output import Call

_TIME = {"type": "integer", "description": "Milliseconds after which the command is ended."}


def _schema(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required), "additionalProperties": False}


# Kind of a tool that its client runs to (description, parameters).
CLIENT_TOOLS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "local_shell": (
        "Run a command on the user's machine.",
        _schema(
            {
                "command": {"type": "array", "items": {"type": "string"}, "description": "The program, its arguments."},
                "working_directory": {"type": "string"},
                "timeout_ms": _TIME,
            },
            "command",
        ),
    ),
    "shell": (
        "Run commands in a shell on the user's machine.",
        _schema(
            {
                "commands": {"type": "array", "items": {"type": "string"}},
                "timeout_ms": _TIME,
                "max_output_length": {"type": "integer", "description": "Characters of output to keep."},
            },
            "commands",
        ),
    ),
    "apply_patch": (
        "Create, update or delete one file.",
        _schema(
            {
                "type": {"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                "path": {"type": "string"},
                "diff": {"type": "string", "description": "The change, as a unified diff without a head."},
            },
            "type",
            "path",
        ),
    ),
    "tool_search": ("Find tools for a task.", _schema({"query": {"type": "string"}}, "query")),
}
# Kinds that a server runs, which no model here can use. Others that nobody knows are passed over like them.
SERVER_TOOLS = (
    "web_search",
    "web_search_preview",
    "file_search",
    "mcp",
    "code_interpreter",
    "image_generation",
    "computer",
    "computer_use_preview",
    "programmatic_tool_calling",
    "shell in a container",
    "tool_search of a server",
)
# A call's kind of item to (name for the model, key of its arguments).
CALLS: Mapping[str, tuple[str, str]] = {
    "custom_tool_call": ("", "input"),
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
    "tool_search_call": ("tool_search", "arguments"),
    "computer_call": ("computer", "action"),
    "mcp_call": ("", "arguments"),
    "mcp_approval_request": ("", "arguments"),
}
OUTPUTS = (
    "custom_tool_call_output",
    "local_shell_call_output",
    "shell_call_output",
    "apply_patch_call_output",
    "tool_search_output",
    "computer_call_output",
)
# Items that say nothing to a model of text.
SILENT = (
    "ghost_snapshot",
    "mcp_list_tools",
    "compaction_trigger",
    "configuration_update",
    "additional_tools",
    "mcp_approval_response",
)
# Items whose text another server keeps, or that only it can read.
ELSEWHERE = ("item_reference", "compaction", "compaction_summary")
_ENDINGS = ("_call", "_output", "_request", "_response")  # of items that may yet be invented


def is_known(kind: str) -> bool:
    """Whether an item of history of this kind can be ignored or read."""
    return kind in (*SILENT, *ELSEWHERE, "program") or kind.endswith(_ENDINGS)


def joined_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a function of a namespace. "functions" is the namespace without a name."""
    if not namespace or namespace == "functions":
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


def messages_of(kind: str, item: Mapping[str, Any], note: Note, param: str) -> Iterator[Message]:
    """What an item of history is for a model: a call or text of the assistant, a result, or nothing."""
    identifier = item.get("call_id") or item.get("id")
    call_id = identifier if isinstance(identifier, str) else None
    if kind in CALLS:
        name, key = CALLS[kind]
        own = item.get("name")
        namespace = item.get("namespace")
        called = joined_name(namespace if isinstance(namespace, str) else None, own if isinstance(own, str) else kind)
        arguments = item.get(key)
        if kind == "custom_tool_call":
            arguments = {"input": arguments if isinstance(arguments, str) else ""}
        elif isinstance(arguments, Mapping):
            arguments = {name: value for name, value in arguments.items() if value is not None and value != "exec"}
        elif not isinstance(arguments, str):
            arguments = {}
        yield Message("assistant", "", tool_calls=(ToolCall(name or called, arguments, call_id),))
        if kind == "mcp_call":
            output = item.get("output") or item.get("error") or ""
            yield Message("tool", _output(output, note, param), tool_call_id=call_id)
    elif kind in OUTPUTS:
        found = item.get("output", item.get("tools"))
        yield Message("tool", _output(found, note, param), tool_call_id=call_id)
    elif kind in ELSEWHERE:
        note(kind)
        yield Message("assistant", "[an earlier part of this conversation, which another server keeps]")
    elif kind not in SILENT:
        note(kind)
        yield Message("assistant", gist(kind, item))


def _output(value: Any, note: Note, param: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    texts: list[str] = []
    for part in value if isinstance(value, list) else ():
        if not isinstance(part, Mapping):
            continue
        kind = part.get("type")
        if isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif "stdout" in part or "stderr" in part:
            texts += [part[name] for name in ("stdout", "stderr") if isinstance(part.get(name), str) and part[name]]
            texts += _outcome(part.get("outcome"))
        elif kind in ("function", "namespace"):
            texts.append(f"[tool: {str(part.get('name'))[:128]}]")
        elif isinstance(kind, str):
            texts.append(part_text(kind, part, is_past=True, param=param, note=note))
    return "\n".join(texts)


def _outcome(outcome: Any) -> list[str]:
    if not isinstance(outcome, Mapping):
        return []
    if outcome.get("type") == "timeout":
        return ["[timed out]"]
    code = outcome.get("exit_code")
    return [f"[exit code {code}]"] if isinstance(code, int) and code else []


# ---- answers ----


def call_item(call: Call, origin: Origin) -> dict[str, Any]:
    """A call of a tool that is no function, as the item that its client expects."""
    head: dict[str, Any] = {"call_id": f"call_{secrets.token_hex(12)}", "status": "completed"}
    if origin.kind == "custom":
        item = {"type": "custom_tool_call", "name": origin.name, "input": free_input(call.arguments), **head}
        namespace = {} if origin.namespace is None else {"namespace": origin.namespace}
        return {"id": f"ctc_{secrets.token_hex(12)}", **item, **namespace}
    arguments = _arguments(call.arguments)
    if origin.kind == "local_shell":
        item = {"type": "local_shell_call", "action": {"type": "exec", "env": {}, **arguments}, **head}
        return {"id": f"lsh_{secrets.token_hex(12)}", **item}
    if origin.kind == "shell":
        action = {"timeout_ms": None, "max_output_length": None, **arguments}
        return {"id": f"sh_{secrets.token_hex(12)}", "type": "shell_call", "action": action, **head}
    if origin.kind == "apply_patch":
        return {"id": f"apc_{secrets.token_hex(12)}", "type": "apply_patch_call", "operation": arguments, **head}
    search = {"type": "tool_search_call", "execution": "client", "arguments": arguments}
    return {"id": f"tsc_{secrets.token_hex(12)}", **search, **head}


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
