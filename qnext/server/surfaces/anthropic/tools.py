"""Tools of Anthropic's API that its clients run, as functions with their known parameters. Other tools are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qnext.server.errors import ApiError
from qnext.server.surfaces.anthropic.bodies import CountBody, SchemaTool
from qnext.server.surfaces.history import Note
from qnext.server.surfaces.tools import Collected, Offer

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PATH = {"type": "string", "description": "Absolute path of a file or folder."}
_EDITS = {
    "path": _PATH,
    "file_text": {"type": "string", "description": "For create: the text of the file."},
    "old_str": {"type": "string", "description": "For str_replace: the text to replace, which stands there once."},
    "new_str": {"type": "string", "description": "For str_replace: what replaces it."},
    "insert_line": {"type": "integer", "description": "For insert: the line behind which to insert; 0 is the top."},
    "insert_text": {"type": "string", "description": "For insert: the text to insert."},
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "For view: first and last line; -1 is the end.",
    },
}


def _schema(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


# Beginning of the type to (name where the client gives none, description, parameters).
CLIENT_TOOLS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "bash_": (
        "bash",
        "Run a command in a shell that stays open.",
        _schema(
            {
                "command": {"type": "string", "description": "The command to run."},
                "restart": {"type": "boolean", "description": "Start the shell anew instead."},
            }
        ),
    ),
    "text_editor_": (
        "str_replace_based_edit_tool",
        "View, create and edit files.",
        _schema(
            {"command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]}, **_EDITS},
            "command",
            "path",
        ),
    ),
    "memory_": (
        "memory",
        "View, create, edit, rename and delete files of notes under /memories.",
        _schema(
            {
                "command": {
                    "type": "string",
                    "enum": ["view", "create", "str_replace", "insert", "delete", "rename"],
                },
                **_EDITS,
                "old_path": {"type": "string", "description": "For rename: the present path."},
                "new_path": {"type": "string", "description": "For rename: the new path."},
            },
            "command",
        ),
    ),
}


def offer(body: CountBody, note: Note) -> Offer:
    """The tools and how they may be used. `note` is told of tools that nobody here runs. Raises ApiError 400."""
    found = Collected()
    for tool in body.tools or ():
        if isinstance(tool, SchemaTool):
            found.add(tool.name, tool.description, tool.input_schema, is_strict=tool.strict)
            continue
        known = next((entry for kind, entry in CLIENT_TOOLS.items() if tool.type.startswith(kind)), None)
        if known is None:
            note(tool.type)
            continue
        name, description, parameters = known
        found.add(tool.name or name, description, parameters)
    if body.mcp_servers:
        note("mcp_servers")
    choice = body.tool_choice
    if choice is None:
        return found.offered(None)
    if choice.type != "tool":
        return found.offered(_CHOICES[choice.type])
    if choice.name is None:
        raise ApiError.bad("a choice of type tool needs a name", param="tool_choice.name")
    return found.offered({"type": "function", "name": choice.name})
