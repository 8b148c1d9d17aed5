"""Where a model folder keeps its chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from qnext.errors import CorruptCheckpoint, warn
from qnext.text.files import read_json_object, read_text

MAX_TEMPLATE_CHARACTERS = 1 << 20
DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATE_FILES = {
    "chat_template.jinja": "the template of all conversations",
    "tokenizer_config.json": "chat_template, a text or a list of named ones",
    "chat_template.json": "an object with chat_template",
    "additional_chat_templates/tool_use.jinja": "the template of conversations with tools",
}


class TemplateTexts(NamedTuple):
    """Templates by name, one of them "default", and the file that error messages name."""

    source: str
    texts: dict[str, str]


def read_templates(folder: Path) -> TemplateTexts | None:
    """The templates of a folder, or None where it has none.

    chat_template.jinja counts first, then tokenizer_config.json, then chat_template.json. A template for tools may
    stand beside the first as additional_chat_templates/tool_use.jinja. Names other than "default" and "tool_use" are
    ignored. Raises CorruptCheckpoint for templates that are no text, or too long.
    """
    found = _from_text_file(folder) or _from_json_files(folder)
    if found is None:
        return None
    for text in found.texts.values():
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise CorruptCheckpoint(f"{found.source}: chat template longer than {MAX_TEMPLATE_CHARACTERS} characters")
    if found.texts.get(TOOL_USE) == found.texts[DEFAULT]:
        del found.texts[TOOL_USE]
    return found


def _from_text_file(folder: Path) -> TemplateTexts | None:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return None
    texts = {DEFAULT: read_text(path)}
    for_tools = folder / "additional_chat_templates" / f"{TOOL_USE}.jinja"
    if for_tools.is_file():
        texts[TOOL_USE] = read_text(for_tools)
    return TemplateTexts(str(path), texts)


def _from_json_files(folder: Path) -> TemplateTexts | None:
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        value = read_json_object(path).get("chat_template")
        if value is not None:
            return TemplateTexts(str(path), _named(value, path))
    return None


def _named(value: Any, path: Path) -> dict[str, str]:
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, dict) and value:  # by name, as some tools write it
        value = [{"name": name, "template": text} for name, text in value.items()]
    texts: dict[str, str] = {}
    for entry in value if isinstance(value, list) else [None]:
        name = entry.get("name") if isinstance(entry, dict) else None
        text = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(text, str):
            raise CorruptCheckpoint(f"{path}: chat_template must be a string or a list of objects name, template")
        texts[name] = text
    if DEFAULT not in texts:
        raise CorruptCheckpoint(f"{path}: chat_template has no template named {DEFAULT!r}")
    if others := sorted(set(texts) - {DEFAULT, TOOL_USE}):
        warn(f"{path}: chat templates that are not used: {', '.join(others)}")
    return {name: text for name, text in texts.items() if name in (DEFAULT, TOOL_USE)}
