"""`qnext verify`: every check that loading makes, and the tokenizer's, without keeping the model."""

from __future__ import annotations

import json
import sys

import typer

from qnext.cli.flags.values import AsJson, Model, Strict

_MAX_LINES = 20


def command(
    model: Model,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Check names, shapes, dtypes and values of every tensor, the tokenizer, and the hashes of a provenance.json.

    Exit code 5 where something is damaged or contradictory, 6 where the only fault is a form that is not supported.
    What is passed over is listed as warnings, which --strict makes problems.
    """
    from qnext.checkpoint.provenance import read_provenance
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli.terminal.progress import byte_progress
    from qnext.diagnostics.folder import examine

    folder = resolve_model(model)
    with byte_progress("reading") as progress:
        found = examine(folder, progress)
    if strict:
        found = found.strict()
    problems, passed_over = map(str, found.problems), [str(warning) for warning in found.warnings]
    if as_json:
        document = {"model": model, "ok": not found.problems, "problems": list(problems), "warnings": passed_over}
        document["has_provenance"] = read_provenance(folder) is not None
        print(json.dumps(document, indent=2))
    else:
        if not found.problems:
            print(f"{model}: ok")
        _print_lines([f"warning: {line}" for line in passed_over])
        _print_lines(list(problems))
    if found.problems:
        raise typer.Exit(found.exit_code)


def _print_lines(lines: list[str]) -> None:
    for line in lines[:_MAX_LINES]:
        print(f"qnext verify: {line}", file=sys.stderr)
    if len(lines) > _MAX_LINES:
        print(f"qnext verify: and {len(lines) - _MAX_LINES} more", file=sys.stderr)
