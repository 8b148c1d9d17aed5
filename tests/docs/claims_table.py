"""The table of README that shows the published claims beside what was found: made from docs/claims.json.

`python -m tests.docs.claims_table` writes it, after a report of `qnext claims --long` was put into docs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qnext.claims.report import found_text, table

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "claims.json"
_BEGIN = "<!-- of docs/claims.json: python -m tests.docs.claims_table -->\n"
_END = "<!-- end -->\n"


def claims_table() -> str:
    """A row for each script: its claims with what was published, what was found, and whether it shows."""
    document = json.loads(REPORT.read_text(encoding="utf-8"))
    rows = [[f"{part['number']} {part['title']}", *_columns(part)] for part in document["scripts"]]
    return "\n".join(table(("claim", "published", "here"), rows)) + "\n"


def _columns(part: dict[str, Any]) -> Iterator[str]:
    yield "; ".join(f"{claim['claim']}: {claim['published']}" for claim in part["claims"])
    yield "; ".join(f"{found_text(claim['found'])} ({claim['judgement']})" for claim in part["claims"])


def split(text: str) -> tuple[str, str, str]:
    """What stands before the table in README, the table, and what stands behind it."""
    before, rest = text.split(_BEGIN)
    shown, after = rest.split(_END)
    return before + _BEGIN, shown, _END + after


if __name__ == "__main__":
    readme = ROOT / "README.md"
    head, _, tail = split(readme.read_text(encoding="utf-8"))
    readme.write_text(head + claims_table() + tail, encoding="utf-8")
