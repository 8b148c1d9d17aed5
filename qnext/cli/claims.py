"""`qnext claims`: the published claims about the architecture, run here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.values import AsJson


def command(
    is_long: Annotated[bool, typer.Option("--long", help="the form of hours; else one of seconds")] = False,
    only: Annotated[str | None, typer.Option(help="some of them", metavar="C3,C4")] = None,
    out: Annotated[Path, typer.Option(help="keeps what was measured, and gets the report", metavar="FOLDER")] = Path(
        "runs/claims"
    ),
    minutes: Annotated[float | None, typer.Option(min=0, help="begin nothing new after so long")] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="programs of llama.cpp, to be timed in C3 and C4", metavar="FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what was claimed of Qwen3-Next, print it beside the published numbers, and write a report.

    Every measured point is kept at once: a second call goes on behind it. The report is claims.md and claims.html in
    the folder, with claims.json for programs. Numbers of the short form are no results: it shows that all of it runs.
    """
    from qnext.bench.llama import find_tools
    from qnext.claims.notebook import Notebook
    from qnext.claims.report import SUMMARY_HEADER, summary_rows, table
    from qnext.claims.run import chosen_scripts, run_claims
    from qnext.claims.writing import write_report

    scripts, folder = chosen_scripts(only), out / ("long" if is_long else "short")
    llama_bench = None if llama_cpp is None else find_tools(llama_cpp).bench
    notebook = Notebook(
        folder,
        seconds=None if minutes is None else 60 * minutes,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    document, pictures = run_claims(scripts, notebook, is_long=is_long, llama_bench=llama_bench)
    report = write_report(document, pictures, folder)
    print(json.dumps(document) if as_json else "\n".join(table(SUMMARY_HEADER, summary_rows(document))))
    print(f"report: {report}", file=sys.stderr)
