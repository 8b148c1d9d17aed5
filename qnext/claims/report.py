"""The document of the claims as Markdown. Pictures are files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MARKS = {"shown": "shown", "not shown": "**not shown here**", "open": "open", "not measured": "not measured"}
SUMMARY_HEADER = ("claim", "published", "here", "bound", "result")


def markdown(document: Mapping[str, Any], *, title: str, picture_folder: str) -> str:
    """The whole report. `picture_folder` is where its pictures lie, as links name it."""
    lines = [f"# {title}", "", *_about(document), "", *table(SUMMARY_HEADER, summary_rows(document)), ""]
    for part in document["scripts"]:
        lines += [*_part(part, picture_folder), ""]
    return "\n".join(lines).rstrip() + "\n"


def summary_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """A row for each claim: what README shows, too."""
    return [
        [
            f"{part['number']} {claim['claim']}",
            claim["published"],
            found_text(claim["found"]),
            claim["bound"],
            _MARKS[claim["judgement"]],
        ]
        for part in document["scripts"]
        for claim in part["claims"]
    ]


def found_text(found: Mapping[str, float | None] | None) -> str:
    """A value, with its interval where it has one."""
    if found is None:
        return "-"
    value, low, high = found["value"], found["low"], found["high"]
    assert value is not None
    if low is None or high is None:
        return f"{number(value)} (one run)"
    if low == high:
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three digits that count."""
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In Markdown."""
    body = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in body]


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|")


def _about(document: Mapping[str, Any]) -> Iterator[str]:
    form = "`qnext claims --long`" if document["form"] == "long" else "`qnext claims`, the short form"
    yield f"Made by {form}, qnext {document['qnext']}, {document['date']}."
    yield ""
    yield (
        "`qnext claims --long --minutes 3 --out FOLDER` measures for three minutes, and the next call goes on where it "
        "ended; `--only C5,C7` measures some of them, and `--llama-cpp FOLDER` times the programs of llama.cpp too. "
        "Speeds need a machine that does nothing else."
    )
    yield ""
    yield (
        "*Shown*: the number here, with its whole 95 % interval, is within the bound. *Not shown here*: it is outside. "
        "*Open*: the interval reaches over the bound."
    )


def _part(part: Mapping[str, Any], picture_folder: str) -> Iterator[str]:
    yield f"## {part['number']}. {part['title']}"
    yield ""
    yield from table(
        ("published", "source", "here", "bound", "result"),
        [
            [
                f"{claim['claim']}: {claim['published']}",
                claim["source"],
                found_text(claim["found"]),
                claim["bound"],
                _MARKS[claim["judgement"]],
            ]
            for claim in part["claims"]
        ],
    )
    yield ""
    yield f"**What was run.** {part['setting']} {machine_text(part)}"
    yield ""
    yield f"**Predicted before.** {part['prediction']}"
    for grid in part["grids"]:
        yield ""
        yield f"**{grid['title']}**"
        yield ""
        yield from table(grid["header"], grid["rows"])
    for picture in part["pictures"]:
        yield ""
        yield f"![{picture['title']}]({picture_folder}/{picture['name']}.svg)"
    for note in part["notes"]:
        yield ""
        yield note
    yield ""
    yield f"**How far it carries.** {part['reach']}"


def machine_text(part: Mapping[str, Any]) -> str:
    """Where and when, and whether everything was measured."""
    points = part["points"]
    if not points["known"]:
        return "Nothing was measured yet."
    machines = " and ".join(map(_machine, part["machines"]))
    rest = "" if points["known"] == points["of"] else f" {points['known']} of {points['of']} points were measured."
    return f"Measured on {machines}; {' to '.join(dict.fromkeys([part['dates'][0], part['dates'][-1]]))}.{rest}"


def _machine(found: Mapping[str, Any]) -> str:
    generation = f" ({found['generation']})" if found.get("generation") else ""
    return f"{found['cpu']}{generation}, {found['cores']} cores"
