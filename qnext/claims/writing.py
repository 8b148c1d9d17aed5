"""The files of a report: Markdown, HTML, pictures, and the document itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qnext.claims.claim import Picture
from qnext.claims.page import html
from qnext.claims.report import markdown
from qnext.diagnostics.charts import write_charts
from qnext.files import remove_file, write_file

TITLE = "The published claims, run here"


def write_report(
    document: Mapping[str, Any], pictures: Sequence[Picture], folder: Path, *, name: str = "claims"
) -> Path:
    """`NAME.json`, `NAME.md`, `NAME.html`, and the pictures in the folder NAME; returns the path of the Markdown."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    drawn = {}
    for old in (folder / name).glob("*.svg"):
        remove_file(old)
    for picture in pictures:
        path = folder / name / f"{picture.name}.svg"
        write_charts(path, picture.charts, title=picture.title)
        drawn[picture.name] = path.read_text(encoding="utf-8")
    write_file(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
    write_file(folder / f"{name}.html", html(document, drawn, title=TITLE))
    path = folder / f"{name}.md"
    write_file(path, markdown(document, title=TITLE, picture_folder=name))
    return path
