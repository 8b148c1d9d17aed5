"""Runs the experiments behind the claims, and makes one document of what was found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qnext.claims.catalogue import CLAIMS
from qnext.claims.claim import Findings, Picture, Script, Workplace, interval_document
from qnext.claims.notebook import Measured, Notebook
from qnext.claims.scripts import SCRIPTS
from qnext.errors import UsageError, did_you_mean
from qnext.version import __version__


def chosen_scripts(only: str | None) -> list[Script]:
    """Those that are named, as `C3,C4`, or all. UsageError lists the known ones."""
    if only is None:
        return list(SCRIPTS)
    by_number = {script.number: script for script in SCRIPTS}
    names = [part.strip().upper() for part in only.split(",")]
    for name in names:
        if name not in by_number:
            raise UsageError(f"--only {name}: there are {', '.join(by_number)}{did_you_mean(name, by_number)}")
    return [script for script in SCRIPTS if script.number in names]


def run_claims(
    scripts: Sequence[Script], notebook: Notebook, *, is_long: bool, llama_bench: str | None = None
) -> tuple[dict[str, Any], list[Picture]]:
    """Measure what is missing, as long as the notebook has time, and judge every claim by what is known then.

    The document is for programs; a report is made of it and of the pictures.
    """
    parts: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    for script in scripts:
        experiment = script.long if is_long else script.short
        points = list(experiment.points(Workplace(notebook.folder, llama_bench)))
        known = notebook.fill(points)
        found = experiment.findings(known)
        parts.append(_part(script, found, known, num_points=len(points)))
        pictures += found.pictures
    form, date = "long" if is_long else "short", time.strftime("%Y-%m-%d")
    return {"qnext": __version__, "form": form, "date": date, "scripts": parts}, pictures


def _part(script: Script, found: Findings, known: dict[str, Measured], *, num_points: int) -> dict[str, Any]:
    """For programs."""
    machines = {(entry.machine["cpu"], entry.machine.get("generation")): entry.machine for entry in known.values()}
    return {
        "number": script.number,
        "title": script.title,
        "prediction": script.prediction,
        "reach": script.reach,
        "setting": found.setting,
        "machines": list(machines.values()),
        "dates": sorted({entry.date for entry in known.values()}),
        "points": {"known": len(known), "of": num_points},
        "claims": [claim.judged(found.values) for claim in CLAIMS if claim.script is script],
        "values": {name: interval_document(value) for name, value in found.values.items()},
        "grids": [grid._asdict() for grid in found.grids],
        "pictures": [{"name": picture.name, "title": picture.title} for picture in found.pictures],
        "notes": list(found.notes),
    }
