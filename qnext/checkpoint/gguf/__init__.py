"""GGUF, the container that llama.cpp reads, to folders and back: `export_gguf` and `import_gguf`.

Facts about the format come from ggml's docs/gguf.md, about names and block layouts from llama.cpp's sources
(conversion/, src/models/, ggml-quants.c). Reading headers needs no torch. May import the files of checkpoint beside it
and what stands below. A new type of block goes into `block_types.py`, a new name into `names.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.lazy import lazy_names

if TYPE_CHECKING:
    from qnext.checkpoint.gguf.block_types import EXPORT_TYPES
    from qnext.checkpoint.gguf.parts import find_gguf, read_gguf
    from qnext.checkpoint.gguf.read import import_gguf
    from qnext.checkpoint.gguf.write import export_gguf

__all__ = ["EXPORT_TYPES", "export_gguf", "find_gguf", "import_gguf", "read_gguf"]

__getattr__ = lazy_names(
    __name__,
    {
        "EXPORT_TYPES": "block_types",
        "export_gguf": "write",
        "import_gguf": "read",
        "read_gguf": "parts",
        "find_gguf": "parts",
    },
)
