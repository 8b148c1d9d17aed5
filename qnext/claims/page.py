"""The document of the claims as one HTML file: no script, and nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from qnext.claims.report import SUMMARY_HEADER, found_text, machine_text, summary_rows

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92em; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
"""


def html(document: Mapping[str, Any], pictures: Mapping[str, str], *, title: str) -> str:
    """`pictures` are SVG by their names."""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f"<p>qnext {escape(document['qnext'])}, {document['form']} form, {escape(document['date'])}.</p>",
        *_table(SUMMARY_HEADER, [[cell.replace("**", "") for cell in row] for row in summary_rows(document)]),
    ]
    for part in document["scripts"]:
        parts += _part(part, pictures)
    return "\n".join([*parts, "</body></html>\n"])


def _part(part: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    yield f"<h2>{part['number']}. {escape(part['title'])}</h2>"
    header = ("claim", "published", "source", "here", "bound", "result")
    rows = [
        (each["claim"], each["published"], each["source"], found_text(each["found"]), each["bound"], each["judgement"])
        for each in part["claims"]
    ]
    yield from _table(header, rows)
    yield f"<p><b>What was run.</b> {escape(part['setting'])} {escape(machine_text(part))}</p>"
    yield f"<p><b>Predicted before.</b> {escape(part['prediction'])}</p>"
    for grid in part["grids"]:
        yield f"<p><b>{escape(grid['title'])}</b></p>"
        yield from _table(grid["header"], grid["rows"])
    for picture in part["pictures"]:
        yield f"<figure>{pictures[picture['name']]}</figure>"
    for note in part["notes"]:
        yield f"<p>{escape(note)}</p>"
    yield f"<p><b>How far it carries.</b> {escape(part['reach'])}</p>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
    yield "</table>"
