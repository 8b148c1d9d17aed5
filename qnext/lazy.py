"""Imports the names of a package when they are first used, because torch, for example, takes seconds to start."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from qnext.collecting import without_collecting

_import = without_collecting(importlib.import_module)  # what it makes stays


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: `homes` maps each name to the module below it that has it."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(_import(f"{package}.{homes[name]}"), name)

    return get
