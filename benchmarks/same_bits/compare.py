"""Two tables of digests: what is in one and not in the other, and where equal names differ first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHOWN = 160


def read_digests(path: Path) -> dict[str, Any]:
    """By name, as far as they were written."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["name"]: line["digest"] for line in map(json.loads, lines)}


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """Where two digests differ first, and how; answers come before the course that led to them."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in old or key not in new:
                return f"{place}/{key} is only in {'the new' if key in new else 'the baseline'}"
            found = first_difference(old[key], new[key], f"{place}/{key}")
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        for number, (left, right) in enumerate(zip(old, new)):  # noqa: B905 - lengths are compared below
            found = first_difference(left, right, f"{place}[{number}]")
            if found is not None:
                return found
        return None if len(old) == len(new) else f"{place} has {len(old)} and {len(new)} entries"
    return None if old == new else f"{place}: {_shown(old)} and {_shown(new)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
