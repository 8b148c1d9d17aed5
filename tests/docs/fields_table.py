"""Makes docs/guide/fields.md of the server's tables: `python -m tests.docs.fields_table` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qnext.engine.sampling.schema_keywords import ENFORCED, FORMATS, RELAXED
from qnext.server.body.foreign_fields import REFUSED, WITHOUT_EFFECT, Foreign
from qnext.server.surfaces.anthropic import tools as anthropic
from qnext.server.surfaces.history import PLACEHOLDERS
from qnext.server.surfaces.openai import foreign

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "fields.md"


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            "# What is ignored, translated or refused",
            "",
            "Clients send fields that other servers have. The server drops none of them silently. A field works, or it",
            "is refused by name, or the answer names it in the header `X-Qnext-Ignored` and the log has one line. This",
            "page is made from the server's tables by `python -m tests.docs.fields_table`.",
            "",
            "## Fields without effect",
            "",
            "A field with the value null counts as absent. Fields that are in no table are named in the header too. A",
            "field whose name a header cannot hold is named `a-field-of-another-name`. An object that has one key",
            "twice is refused.",
            "",
            "| fields | of | why |",
            "|---|---|---|",
            *_rows(WITHOUT_EFFECT),
            "",
            "## Fields that are refused",
            "",
            "| fields | of | why |",
            "|---|---|---|",
            *_rows(REFUSED),
            "",
            "## Thoughts",
            "",
            "A request may ask for something about thoughts that its model cannot do. Then the header names the",
            "argument of the chat template that would express it, whatever field the request used:",
            "",
            "- `enable_thinking` or `thinking`, where the template has no switch and the answer begins otherwise;",
            "- `reasoning_effort`, in the same case;",
            "- `thinking_budget`, where the template does not read it.",
            "",
            "Every other argument in `chat_template_kwargs` that the template does not read is refused.",
            "",
            "## Tools of other kinds",
            "",
            "Tools that the client runs become functions for the model. Their calls come back in the client's own",
            "form:",
            "",
            "- OpenAI's API: `custom` (the input is free text; the model sees the grammar of it, which is not",
            f"  enforced), `namespace` (the model sees `NAMESPACE__NAME`), {_list(foreign.CLIENT_TOOLS)};",
            f"- Anthropic's API: {_list(f'{kind}*' for kind in anthropic.CLIENT_TOOLS)}.",
            "",
            f"Tools that a server runs are ignored and named: {', '.join(foreign.SERVER_TOOLS)}, and every unknown",
            "kind.",
            "",
            "## History",
            "",
            "Earlier turns become text where they hold something else:",
            "",
            f"- {_list(PLACEHOLDERS)}: a short note in brackets;",
            "- documents of plain text, and results of searches and of tools of other servers: their readable text;",
            "- calls of tools of other kinds: calls;",
            "- a result whose call is missing: text of the user.",
            "",
            "In the current question (the last message, of the user) a picture, a sound or a file is refused with",
            "`unsupported_content`. Results of tools belong to the history.",
            "",
            "The server removes Claude Code's line `x-anthropic-billing-header: ...` from system prompts. It changes",
            "with every request, so no prefix behind it could come from the cache.",
            "",
            "## Schemas",
            "",
            "This section is about the schemas of answers, and of tools whose call is forced. The prompt shows a",
            "tool's schema as it was written, without keywords that are null.",
            "",
            f"- Enforced: {_list(ENFORCED)}. Of `format`: {_list(FORMATS)}.",
            "- Ignored, because they do not restrict the form: all other keywords, and other formats.",
            "- Relaxed in a schema without `strict`, and refused by keyword and place in a strict schema:",
            "",
            "| keyword | effect on the answer |",
            "|---|---|",
            *(f"| `{keyword}` | {text} |" for keyword, text in RELAXED.items()),
            "",
        ]
    )


def _rows(tables: Mapping[str, Mapping[str, Foreign]]) -> list[str]:
    """Fields of one reason and the same routes stand together."""
    routes: dict[tuple[str, str], list[str]] = {}
    for path, table in tables.items():
        for name, field in table.items():
            neutral = f" (except {', '.join(json.dumps(value) for value in field.neutral)})" if field.neutral else ""
            routes.setdefault((f"`{name}`{neutral}", field.why), []).append(f"`{path.removeprefix('/v1')}`")
    found: dict[tuple[str, str], list[str]] = {}
    for (name, why), paths in routes.items():
        found.setdefault((", ".join(paths), why), []).append(name)
    return [f"| {', '.join(names)} | {paths} | {why} |" for (paths, why), names in found.items()]


def _list(names: object) -> str:
    assert not isinstance(names, str)
    return ", ".join(f"`{name}`" for name in names)  # type: ignore[attr-defined]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
