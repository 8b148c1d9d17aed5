"""`qnext inspect`: what a model consists of, from its headers alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qnext.cli.flags.values import AsJson, Strict


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL|PRESET", help="a folder, a hub name, or a preset")],
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Print parameters by part, active parameters, dtypes, shapes, and what a sequence costs."""
    from qnext.diagnostics.inventory import inventory_document, take_inventory

    report = take_inventory(model)
    if as_json:
        print(json.dumps(inventory_document(report), indent=2))
    else:
        from qnext.diagnostics.tables import show_inventory

        show_inventory(report)
