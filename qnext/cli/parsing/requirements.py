"""A package that is missing or too old is one line, with what to do, and no traceback."""

from __future__ import annotations

import importlib.metadata
import re

from qnext.errors import UsageError

OLDEST_TORCH = (2, 11)  # as pyproject.toml has it
_WITHOUT_TORCH = ("completion", "pull", "keys", "audit", "doctor", "bench-serve", "watch")


def check_torch(verb: str) -> None:
    """Raises UsageError where the installed torch is too old for a verb that needs it. Does not import it."""
    if verb in _WITHOUT_TORCH:
        return
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return  # whatever imports it says so
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UsageError(f"torch {version} is too old, {oldest} or newer is needed: pip install -U 'torch>={oldest}'")


def missing(error: ImportError) -> str | None:
    """A line about a package that cannot be imported; None where the fault is in qnext itself."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "qnext":
        return None
    if isinstance(error, ModuleNotFoundError):
        hint = (
            "README.md says how to get the build for the CPU alone" if name == "torch" else "`qnext doctor` lists all"
        )
        return f"the Python package {name} is not installed: pip install {name} ({hint})"
    return f"the Python package {name} cannot be loaded: {' '.join(str(error).split())[:200]}"
