"""Disk to model and back: folders of safetensors files as Hugging Face lays them out, and GGUF in `gguf/`.

`header.py` reads what files say (`CheckpointIndex`), `check.py` compares it with the configuration (`Layout`), both
without torch; `load.py`, `save.py`, `quantize.py` and `snapshot.py` move tensors. `formats/` knows how other programs
pack weights: a new form begins there. May import what stands below, except engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.lazy import lazy_names

if TYPE_CHECKING:
    from qnext.checkpoint.create import create_folder
    from qnext.checkpoint.load import empty_model, load_model
    from qnext.checkpoint.resolve import resolve_model
    from qnext.checkpoint.save import save_model

__all__ = ["create_folder", "empty_model", "load_model", "resolve_model", "save_model"]

__getattr__ = lazy_names(
    __name__,
    {
        "create_folder": "create",
        "empty_model": "load",
        "load_model": "load",
        "resolve_model": "resolve",
        "save_model": "save",
    },
)
