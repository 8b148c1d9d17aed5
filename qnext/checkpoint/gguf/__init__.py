"""GGUF, the container that llama.cpp reads, and back: `export_gguf` and `import_gguf`.

Facts about the format come from ggml's docs/gguf.md, about names and block layouts from llama.cpp's sources
(conversion/, src/models/, ggml-quants.c). Imported when first used: reading headers needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.checkpoint.gguf.block_types import EXPORT_TYPES
    from qnext.checkpoint.gguf.parts import find_gguf, read_gguf
    from qnext.checkpoint.gguf.read import import_gguf
    from qnext.checkpoint.gguf.write import export_gguf

__all__ = ["EXPORT_TYPES", "export_gguf", "find_gguf", "import_gguf", "read_gguf"]

_HOME = {
    "EXPORT_TYPES": "block_types",
    "export_gguf": "write",
    "import_gguf": "read",
    "read_gguf": "parts",
    "find_gguf": "parts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
