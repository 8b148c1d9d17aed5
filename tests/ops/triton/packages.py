"""Packages that stand where those of others would, and compute by the reference."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


def put_module(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Have a module of that name, with the packages around it, until the test ends."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        if part not in sys.modules or count == len(parts):
            module = ModuleType(part)
            module.__spec__ = ModuleSpec(part, None)
            patch.setitem(sys.modules, part, module)
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)
