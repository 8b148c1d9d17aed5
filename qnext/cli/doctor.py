"""`qnext doctor`: what this machine and a model offer, and what is in the way."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.values import AsJson, Strict

if TYPE_CHECKING:
    from qnext.diagnostics.finding import Finding


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="a folder or a hub name to look at too")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="of the checkpoint read headers, not every value")] = False,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Look at software, processor, kernels, memory and disk, and at MODEL: memory plan, checkpoint, tokenizer, chat.

    Exit code 0 where there is no problem (warnings may be), 1 where there is one, 3 for a model that is not found, 5
    for a corrupt one, 6 for one that is not supported.
    """
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli.terminal.progress import byte_progress
    from qnext.diagnostics.machine import machine_findings
    from qnext.diagnostics.model import model_findings
    from qnext.diagnostics.tables import show_findings
    from qnext.errors import CorruptCheckpoint, NotSupported

    folder = None if model is None else resolve_model(model)
    sections: dict[str, list[Finding]] = {"machine": list(machine_findings())}
    if folder is not None:
        with byte_progress("reading") as progress:
            sections["model"] = list(model_findings(folder, quick=quick, progress=progress))
    found = [finding for findings in sections.values() for finding in findings]
    problems = [finding for finding in found if finding.status == "problem"]
    if as_json:
        document = {name: [finding._asdict() for finding in findings] for name, findings in sections.items()}
        print(json.dumps({"ok": not problems, "folder": None if folder is None else str(folder), **document}, indent=2))
    else:
        show_findings(sections)
        warned = sum(finding.status == "warning" for finding in found)
        print(f"{len(problems)} problems, {warned} warnings", file=sys.stderr)
    if problems:
        of_files = [problem for problem in problems if problem.name == "checkpoint"]
        is_unsupported = any(problem.data.get("not_supported") for problem in of_files)
        code = NotSupported.exit_code if is_unsupported else CorruptCheckpoint.exit_code
        raise typer.Exit(code if of_files else 1)
