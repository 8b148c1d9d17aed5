"""Parts of a conversation that are no text (pictures, documents, searches), as text for a model that reads only text.

In earlier turns, an unreadable part becomes a short text in brackets and is named to the client. In the current
question it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qnext.server.errors import ApiError

Note = Callable[[str], None]  # is told the kind of what was passed over

# Kinds of parts and blocks, of all surfaces, and what stands in their place.
PLACEHOLDERS: Mapping[str, str] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "computer_screenshot": "image",
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "video": "video",
    "video_url": "video",
    "document": "document",
    "file": "file",
    "input_file": "file",
    "container_upload": "file",
    "resource": "resource",
}
_GISTS = ("text", "title", "url", "source", "query", "content", "stdout", "stderr", "output", "tool_name", "error_code")
_MAX_GIST = 20_000  # characters of what a tool of another server found
_ATTRIBUTION = re.compile(r"^x-anthropic-billing-header:[^\n]*(?:\n|\Z)", re.MULTILINE | re.IGNORECASE)


def without_attribution(text: str) -> str:
    """A system prompt without the line in which Claude Code names itself.

    That line changes with every request, so no prefix behind it could come from the cache.
    """
    return _ATTRIBUTION.sub("", text) if "-billing-header:" in text.lower() else text


def part_text(kind: str, part: Mapping[str, Any], *, is_past: bool, param: str, note: Note) -> str:
    """Text in place of a part or block. Raises ApiError 400 for a part of the current question that has no text."""
    if kind == "search_result" or kind.endswith(("_tool_result", "_tool_use")) or kind in ("compaction", "fallback"):
        return gist(kind, part)
    if kind == "tool_reference":
        return f"[tool: {_short(part.get('tool_name'))}]"
    source = part.get("source")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") in ("text", "content"):
        return "\n".join(texts for texts in (_short(part.get("title")), *_texts(source)) if texts)
    if is_past and kind not in PLACEHOLDERS:
        note(kind)
        return gist(_short(kind), part)
    if not is_past:
        raise ApiError.bad("this model reads text only", param=param, code="unsupported_content")
    note(kind)
    inner = part.get("file")
    name = part.get("title") or part.get("filename") or (inner.get("filename") if isinstance(inner, Mapping) else None)
    named = f" {_short(name)}" if name else ""
    return f"[{PLACEHOLDERS[kind]}{named}: this model reads text only]"


def gist(kind: str, value: Mapping[str, Any]) -> str:
    """The readable text of a call that another server ran, or of its result."""
    name = value.get("name")
    head = f"{kind} {_short(name)}" if name else kind
    arguments = value.get("input", value.get("action"))
    found = [json.dumps(arguments, ensure_ascii=False)] if isinstance(arguments, Mapping) and arguments else []
    text = "\n".join([*found, *_texts(value)])[:_MAX_GIST]
    return f"[{head}]\n{text}" if text else f"[{head}]"


def _texts(value: Any) -> Iterator[str]:
    """Readable texts of a value: encoded ones and ids are passed over."""
    if isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, Mapping):
        for key in _GISTS:
            inner = value.get(key)
            if isinstance(inner, str) and inner:
                yield inner
            elif isinstance(inner, (list, Mapping)):
                yield from _texts(inner)
        if value.get("type") in ("text", "content") and isinstance(value.get("data"), str):
            yield value["data"]


def _short(name: Any) -> str:
    return " ".join(name.split())[:128] if isinstance(name, str) else ""
