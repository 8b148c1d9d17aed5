"""The files of a report: Markdown, HTML, and the document itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnext.claims.page import html
from qnext.claims.report import markdown
from qnext.files import write_file

TITLE = "The published claims, run here"


def write_report(document: Mapping[str, Any], folder: Path, *, name: str = "claims") -> Path:
    """`NAME.json`, `NAME.md` and `NAME.html` in the folder; returns the path of the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
    write_file(folder / f"{name}.html", html(document, title=TITLE))
    path = folder / f"{name}.md"
    write_file(path, markdown(document, title=TITLE))
    return path
