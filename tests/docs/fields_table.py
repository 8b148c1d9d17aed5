"""Makes docs/guide/fields.md of the server's tables: `python -m tests.docs.fields_table` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qnext.engine.sampling.schemas import ENFORCED, FORMATS, RELAXED
from qnext.server.anthropic import tools as anthropic
from qnext.server.fields import REFUSED, WITHOUT_EFFECT, Foreign
from qnext.server.history import PLACEHOLDERS
from qnext.server.openai import foreign

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "fields.md"


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            "# What is passed over, translated or refused",
            "",
            "Clients send what other servers have. Nothing of it is dropped in silence: it works, or is refused with",
            "its name, or the answer names it in the header `X-Qnext-Ignored` and the log has one line. This page is",
            "made from the server's tables by `python -m tests.docs.fields_table`.",
            "",
            "## Fields without effect",
            "",
            "null is as if the field were not there. Fields that no table knows are named likewise; those whose name",
            "no header can hold are `a-field-of-another-name`. An object that has one key twice is refused.",
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
            "What a request says of thoughts and its model cannot do is named by the argument of the chat template",
            "that would say it, whatever field said it: `enable_thinking` or `thinking` where the template has no",
            "switch and the answer begins otherwise all the same, `reasoning_effort` likewise, `thinking_budget` where",
            "the template reads none. Other arguments in `chat_template_kwargs` that the template does not read are",
            "refused.",
            "",
            "## Tools of other kinds",
            "",
            "Those that the client runs become functions for the model, and their calls come back in the client's own",
            "form: of OpenAI's API `custom` (the input is free text; its grammar is shown to the model, not enforced),",
            "`namespace` (the model sees `NAMESPACE__NAME`), "
            f"{_list(foreign.CLIENT_TOOLS)}; of Anthropic's {_list(f'{kind}*' for kind in anthropic.CLIENT_TOOLS)}.",
            "",
            f"Those that a server runs are passed over and named: {', '.join(foreign.SERVER_TOOLS)}, and every kind",
            "that is not known.",
            "",
            "## History",
            "",
            f"What earlier turns hold beside text becomes text: {_list(PLACEHOLDERS)}",
            "a short note in brackets; documents of plain text, results of searches and of",
            "other servers' tools what can be read; calls of tools of other kinds calls; a result whose call is gone",
            "text of the user. In the question that is asked now (the last message, of the user) a picture, a sound or",
            "a file is refused with `unsupported_content`; results of tools are history.",
            "",
            "Claude Code's line `x-anthropic-billing-header: ...` is left out of system prompts: it changes with every",
            "request, and what stands behind it could not come from the cache.",
            "",
            "## Schemas",
            "",
            "Of tools whose call is forced, and of answers. The prompt shows a tool's schema as it was written, but",
            "for keywords that are null.",
            "",
            f"- Enforced: {_list(ENFORCED)}. Of `format`: {_list(FORMATS)}.",
            "- Without meaning for a form, and passed over: all other keywords, and other formats.",
            "- Relaxed where the schema is not `strict`, else refused by keyword and place:",
            "",
            "| keyword | the answer then |",
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
            neutral = f" (but for {', '.join(json.dumps(value) for value in field.neutral)})" if field.neutral else ""
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
