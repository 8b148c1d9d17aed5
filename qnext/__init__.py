"""qnext: a complete, open implementation of the Qwen3-Next architecture."""

from __future__ import annotations

from qnext.openmp import bound_spinning

__version__ = "0.1.0"

bound_spinning()
