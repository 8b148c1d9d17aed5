"""Disk to model and back: safetensors folders as Hugging Face lays them out.

Names are imported when first used: reading headers needs no torch, which takes seconds to start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.checkpoint.create import create_folder
    from qnext.checkpoint.load import empty_model, load_model
    from qnext.checkpoint.resolve import resolve_model
    from qnext.checkpoint.save import save_model

__all__ = ["create_folder", "empty_model", "load_model", "resolve_model", "save_model"]

_HOME = {
    "create_folder": "create",
    "empty_model": "load",
    "load_model": "load",
    "resolve_model": "resolve",
    "save_model": "save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
